"""``python -m fastres.codegen triton|cuda|all [--check] [--jobs N]``: write, or compare, docs/kernels/*.md."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

TABLES = ("triton", "cuda")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastres.codegen", description=__doc__)
    parser.add_argument("table", choices=(*TABLES, "all"), help="which kernels to compile")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    status = 0
    for table in TABLES if options.table == "all" else (options.table,):
        module = importlib.import_module(f"fastres.codegen.{table}")
        root = module.PATH.parents[2]
        if not (root / "pyproject.toml").is_file():
            parser.error(f"{module.PATH.name} lives in the source tree; {root} is none (an installed package?)")
        text = module.generate(jobs=options.jobs)
        if not options.check:
            module.PATH.parent.mkdir(parents=True, exist_ok=True)
            module.PATH.write_text(text)
            print(f"{table}: wrote {module.PATH}")
            continue
        found = module.PATH.read_text() if module.PATH.is_file() else ""
        if found == text:
            print(f"{table}: {module.PATH} is current")
            continue
        status = 1
        sys.stdout.writelines(
            difflib.unified_diff(found.splitlines(True), text.splitlines(True), str(module.PATH), "compiled now", n=1)
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
