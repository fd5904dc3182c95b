"""What can be said about the kernels without a GPU: ``python -m fastres.codegen``.

`triton`, `cuda` and `conv` compile every shipped kernel for each supported architecture and write one table each under
``docs/kernels/``: registers, shared memory, instructions. A table must show no spills; tests keep it current. `model`
predicts the time of a training step, from the kernels in `plans` and the measurements in `calibration`. Each of these
modules offers ``PATH`` (the page) and ``generate(jobs=2) -> str`` (its text). `bare` is the entry for an environment
that has triton and nothing else.
"""
