"""``python -m fastres.codegen TABLE|all [--check] [--jobs N]``: write, or compare, docs/kernels/*.md.

``model`` also prints its tables; with --chip, --batch, --model or --size it only prints.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

TABLES = ("triton", "cuda", "conv", "candidates", "model")
#: A table's figure: the module that draws it.
FIGURES = {"model": "roofline"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastres.codegen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=(*TABLES, "all"), help="compiled kernels, or the performance model")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    shape = parser.add_argument_group("model")
    shape.add_argument("--chip", help="h100 (default), a100-80, l4, b200")
    shape.add_argument("--model", help="a torchvision ResNet (default resnet50)")
    shape.add_argument("--batch", type=int, help="default 256")
    shape.add_argument("--size", type=int, help="pixels of the square images, default 224")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    asked = {k: v for k in ("chip", "model", "batch", "size") if (v := getattr(options, k)) is not None}
    if asked and options.table != "model":
        parser.error(f"--{next(iter(asked))}: expected with the table model only, got {options.table}")
    if asked and options.check:
        parser.error(f"--check: the page has one model and batch; got --{next(iter(asked))} as well")
    if options.table == "model" and not options.check:
        try:
            importlib.import_module("fastres.codegen.model").report(**asked)
        except ValueError as error:
            parser.error(f"--{error}")
        if asked:
            return 0
    status = 0
    for table in TABLES if options.table == "all" else (options.table,):
        status |= _one(parser, table, options)
    return status


def _one(parser: argparse.ArgumentParser, table: str, options: argparse.Namespace) -> int:
    module = importlib.import_module(f"fastres.codegen.{table}")
    if not (module.PATH.parents[2] / "pyproject.toml").is_file():
        parser.error(
            f"{module.PATH.name} lives in the source tree; {module.PATH.parents[2]} is none (an installed package?)"
        )
    text = module.generate(jobs=options.jobs)
    if not options.check:
        module.PATH.parent.mkdir(parents=True, exist_ok=True)
        module.PATH.write_text(text)
        print(f"{table}: wrote {module.PATH}")
        if table in FIGURES:
            print(f"{table}: drew {importlib.import_module(f'fastres.codegen.{FIGURES[table]}').draw()}")
        return 0
    found = module.PATH.read_text() if module.PATH.is_file() else ""
    if found == text:
        print(f"{table}: {module.PATH} is current")
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(found.splitlines(True), text.splitlines(True), str(module.PATH), "made now", n=1)
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
