"""``python fastres/codegen/bare.py conv|triton [...]``: `fastres.codegen` where only triton is installed.

The compilation tables need Triton and nothing else, while ``import fastres`` needs torch. This entry gives the packages
``fastres`` and ``fastres.triton_kernels`` their folders in the source tree without running ``fastres/__init__.py``. So
one bare virtual environment per Triton version is enough to see what each makes of the kernels.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Puts the two packages into ``sys.modules``; in the worker processes of a table as well."""
    spec = importlib.machinery.ModuleSpec("fastres", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / "fastres")]
    sys.modules["fastres"] = importlib.util.module_from_spec(spec)
    kernels = ROOT / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        "fastres.triton_kernels", kernels / "__init__.py", submodule_search_locations=[str(kernels)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastres.triton_kernels"] = sys.modules["fastres"].triton_kernels = module
    spec.loader.exec_module(module)


# A worker imports this file under another name: it must be prepared too, and this file's own folder (with a
# triton.py of ours in it) must not come before the installed packages.
if __name__ in ("__main__", "__mp_main__"):
    here = str(ROOT / "fastres" / "codegen")
    sys.path[:] = [entry for entry in sys.path if entry != here]
    prepare()

if __name__ == "__main__":
    from fastres.codegen.__main__ import main

    sys.exit(main())
