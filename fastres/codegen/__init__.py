"""What the compilers make of the kernels, without a GPU: ``python -m fastres.codegen``.

`triton` and `cuda` compile every shipped kernel for each supported architecture and write one table each under
``docs/kernels/``: registers, shared memory, instructions. A table must show no spills; tests keep it current.
Each module offers ``PATH`` (the table) and ``generate(jobs=2) -> str`` (its text).
"""
