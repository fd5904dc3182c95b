"""The ``fastres`` command: doctor, bench, infer, tune, report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Annotated

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"the fastres command needs typer and rich (pip install typer rich): {error}") from error

app = typer.Typer(
    help="Fused residual networks for PyTorch.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
console = Console()


def main() -> None:
    """Entry point: a wrong request is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except Exception as error:
        from fastres.bench import BenchError

        usage = getattr(error, "format_message", None)  # what click raises for an unknown option
        if usage is not None:
            _fail(usage(), getattr(error, "exit_code", 2))
        if isinstance(error, BenchError):
            _fail(str(error), 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"fastres: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


# ---- doctor


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    short: Annotated[bool, typer.Option("--short", help="Machine, extensions and backends only.")] = False,
    verify: Annotated[bool, typer.Option(help="Run the self-check of each GPU kernel that would be chosen.")] = False,
) -> None:
    """Hardware, what was built, which backends work, and which one serves what and why."""
    from fastres import cli_doctor, cli_tune
    from fastres import doctor as examination

    found = examination.examine(verify)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    machine, versions = found["machine"], found["versions"]
    cpu = machine["cpu"]
    page = cli_doctor.pairs("Machine")
    page.add_row("CPU", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable")
    page.add_row("instruction sets", " ".join(cpu["isa"]) or "unknown on this system")
    for gpu in machine["gpus"]:
        detail = f"sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} SMs, {gpu['memory_gib']} GiB"
        page.add_row("GPU", f"{gpu['name']}, {detail}")
    if not machine["gpus"]:
        page.add_row("GPU", "none that torch can use")
    page.add_row("torch", f"{versions['torch']}, CUDA {versions['cuda']}, Python {versions['python']}")
    runtimes = found["openmp"]
    page.add_row("OpenMP runtimes", "unknown on this system" if runtimes is None else ", ".join(runtimes) or "none")
    if not short:
        for name, value in found["settings"].items():
            page.add_row(name, value)
        for name, value in found["tools"].items():
            page.add_row(name, value)
        page.add_row("other packages", ", ".join(f"{k} {v}" for k, v in list(versions.items())[4:]))
    console.print(page)
    if runtimes and len(runtimes) > 1:
        console.print("[yellow]Two OpenMP runtimes in one process: their thread pools fight for the cores.[/yellow]")

    page = cli_doctor.pairs("Compiled extensions")
    for name, entry in found["extensions"].items():
        page.add_row(name, _extension(entry))
    console.print(page)

    page = cli_doctor.pairs("Backends")
    for name, entry in found["backends"].items():
        state = "[green]available[/green]" if entry["available"] else f"[dim]no: {'; '.join(entry['why_not'])}[/dim]"
        page.add_row(name, state)
    console.print(page)
    if not short:
        console.print(_choices(found["choices"]))

    for table in (*cli_tune.section(found["tuning"], short), *cli_doctor.section(found, short)):
        console.print(table)


def _extension(entry: dict) -> str:
    if not entry["built"]:
        return f"[dim]not built: {entry['why']}[/dim]"
    lines = [entry["file"], entry["compiler"]]
    if "isas" in entry:
        lines[1] += f", instruction set [green]{entry['isa in use']}[/green] of {', '.join(entry['isas'])}"
        lines[1] += f", OpenMP runtime: {entry['OpenMP']}"
        lines += [f"{isa}: {flags}" for isa, flags in entry["flags"].items() if isa in entry["isas"]]
    if "archs" in entry:
        lines[1] += f", archs {entry['archs']}, {entry['flags']}"
    return "\n".join(lines)


def _choices(choices: list[dict]) -> Table:
    """One row for all requests that meet the same answer."""
    table = _columns("Chosen for typical requests")
    for heading in ("device", "dtypes", "ops (channels)", "backend", "why not the ones before it"):
        table.add_column(heading, overflow="fold")
    answers: dict[tuple, dict[str, list[str]]] = {}
    for row in choices:
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in row["passed_over"].items())
        op = row["op"] + (f" ({row['channels']})" if row["channels"] else "")
        per_dtype = answers.setdefault((row["device"], row["backend"], why), {})
        per_dtype.setdefault(row["dtype"], []).append(op)
    for (device, backend, why), per_dtype in answers.items():
        alike: dict[str, list[str]] = {}
        for dtype, ops in per_dtype.items():
            alike.setdefault(", ".join(ops), []).append(dtype)
        for ops, dtypes in alike.items():
            reason = f"[dim]{why or 'first choice of the device'}[/dim]"
            table.add_row(device, ", ".join(dtypes), ops, f"[green]{backend}[/green]", reason)
    return table


# ---- bench


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="resnet50, resnext50_32x4d, ...: a wrong name lists them all.")],
    images: Annotated[str, typer.Option(help="Directory of photographs for the batch; random pixels without.")] = "",
    train: Annotated[bool, typer.Option("--train", help="One training step instead of inference.")] = False,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; training uses autocast.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 224,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own number.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for the measurement, all engines together.")] = 30.0,
    memory: Annotated[str, typer.Option(help="default, or low: recompute more, save less (training).")] = "default",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
    compile_mode: Annotated[str, typer.Option(help="Mode of torch.compile.")] = "default",
    graph: Annotated[bool, typer.Option("--graph", help="Also eager and fastres as CUDA graphs (GPU).")] = False,
    json_file: Annotated[str, typer.Option("--json", help="Write the rows, with their provenance, to FILE.")] = "",
    png_file: Annotated[str, typer.Option("--png", help="Draw a bar chart into FILE.")] = "",
) -> None:
    """Eager channels_last, torch.compile and fastres taking turns on one model, each checked against float64."""
    import torch

    from fastres import bench as harness

    case = harness.Case(
        model=model, train=train, dtype=dtype, batch=batch, size=size, threads=threads, seconds=seconds,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"), images=images or None, memory=memory,
        compile=not no_compile, compile_mode=compile_mode, graph=graph,
    ).checked()  # fmt: skip
    # Inductor's "No CUDA runtime is found" would tear the progress bar; doctor says it better.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        result = harness.run(case, lambda text, done: bar.update(task, description=f"{text:40s}", completed=done))
    for table in _results(result):
        console.print(table)
    for line in _footnotes(result):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    if json_file:
        from fastres.bench import rows

        console.print(f"rows:  {rows.write_json(json_file, result.rows)}", highlight=False, soft_wrap=True)
    if png_file:
        from fastres import figures

        console.print(f"chart: {figures.bench_chart(result.rows, png_file)}", highlight=False, soft_wrap=True)


def _results(result) -> Iterator[Table]:
    """One table, in training two: together they are too wide for a terminal of 80 columns."""
    case = result.case
    job = "one training step" if case.train else "inference"
    speed = _columns(f"{case.model}, {job}: batch {case.batch}, {case.size} px, {case.dtype}, {case.device}")
    checks = _columns("First step against float64, and what is kept for backward")
    headings = ["engine", "ms", "p25-p75", "img/s", "vs eager", "vs peers"]
    for heading in headings if case.train else [*headings, "error"]:
        speed.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=True)
    for heading in ("engine", "logits", "gradients", "loss off by", "saved, MiB"):
        checks.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=True)
    for row in result.rows:
        style = "bold" if row["backend"] == "fastres" else None
        q, error = row["quantiles_ms"], row["error_vs_float64"]
        cells = [_ms(row["median_ms"]), f"{_ms(q['p25'])}-{_ms(q['p75'])}", f"{row['images_per_s']:.1f}"]
        cells += [_ratio(row["ratio_to_eager"]), _ratio(row["ratio_to_best_peer"])]
        logits = f"{error['logits']:.1e}"
        speed.add_row(row["backend"], *cells, *([] if case.train else [logits]), style=style)
        if case.train:
            saved = row.get("saved_for_backward_bytes")
            kept = "-" if saved is None else f"{saved / 2**20:.0f}"
            off = (f"{error['gradients']:.1e}", f"{error['loss_difference']:.1e}")
            checks.add_row(row["backend"], logits, *off, kept, style=style)
    yield speed
    if case.train:
        yield checks


def _columns(title: str) -> Table:
    """Tight columns, at least as wide as the title, which would be wrapped otherwise."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True, min_width=len(title) + 2,
    )  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "withheld" if value is None else f"{value:.2f}x"


def _footnotes(result) -> list[str]:
    case, first = result.case, result.rows[0]
    peers = "vs peers: against the faster of eager and torch.compile"
    lines = [f"{peers}; input: {result.input}; unfused model: {result.baseline}, random weights, seed {case.seed}"]
    if case.train:
        lines.append(
            "logits, gradients: relative L2 distance of the first step's from the unfused float64 model's "
            "(gradients of a deep net at random weights are chaotic: compare with eager's)"
        )
        lines.append("saved: unique storages kept for backward, parameters not counted; not defined for torch.compile")
    else:
        lines.append("error: relative L2 distance of the logits from the unfused float64 model")
        calls = [f"{row['backend']}: {row['call']}" for row in result.rows if "call" in row]
        lines.append("; ".join([*calls, "torch.compile: freezing on"]))
    if any(not row["within_budget"] for row in result.rows):
        lines.append("withheld: further from float64 than twice eager's error, so no speed-up is claimed")
    lines.extend(f"{name} did not run: {why}" for name, why in result.absent.items())
    from fastres.bench import rows

    lines.append(rows.caption(first).splitlines()[0])
    return lines


# ---- infer


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="resnet50, ... (a wrong name lists them all), or a saved session.")],
    images: Annotated[str, typer.Option(help="Directory of photographs.")],
    checkpoint: Annotated[str, typer.Option(help="state_dict of the model, .pth or .safetensors.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    precision: Annotated[str, typer.Option(help="exact, highest or high: of fp32 arithmetic.")] = "highest",
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 1,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 224,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own number.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    save: Annotated[str, typer.Option(help="Write the session to FILE; MODEL may be that file later.")] = "",
    profile: Annotated[str, typer.Option(help="Draw the time of every node into FILE (PNG).")] = "",
) -> None:
    """Classify photographs with an optimized session: top five classes, latency and throughput."""
    from fastres import cli_infer

    request = cli_infer.Request(
        model, images, checkpoint, dtype, precision, batch, size, threads, device, save, profile
    )
    for part in cli_infer.infer(request):
        if isinstance(part, str):
            console.print(part, highlight=False, soft_wrap=True, markup=False)
        else:
            console.print(part)


# ---- tune


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="resnet50, resnext50_32x4d, ...: a wrong name lists them all.")],
    batch: Annotated[int, typer.Option(help="Images in a batch: winners hold for this size.")] = 256,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 224,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; training uses autocast.")] = "bf16",
    train: Annotated[bool, typer.Option("--train/--infer", help="Forward and backward, or inference alone.")] = True,
) -> None:
    """Find the fastest right kernel for each convolution of a model on this GPU, and keep the winners."""
    from fastres import cli_tune

    rows = cli_tune.tune(model, batch, size, dtype, train)
    job = "training" if train else "inference"
    for part in cli_tune.results(rows, f"{model}, {job}: batch {batch}, {size} px, {dtype}"):
        if isinstance(part, str):
            console.print(part, style="dim", highlight=False, soft_wrap=True, markup=False)
        else:
            console.print(part)


# ---- report


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="A ResNet of torchvision or of fastres.models.")],
    train: Annotated[bool, typer.Option("--train", help="Report on training instead of inference.")] = False,
) -> None:
    """What fuse() would fuse in a model, what it would leave alone, and why."""
    from fastres.bench import BenchError, contestants
    from fastres.fusion import report as report_on

    if model not in contestants.names():
        raise BenchError(f"MODEL: got {model!r}, expected one of {', '.join(contestants.names())}")
    built, origin = contestants.baseline(model)
    fused = contestants.fused(train)(built.train(train))
    console.print(f"{model} from {origin}", style="bold", highlight=False)
    console.print(str(report_on(fused)), highlight=False, soft_wrap=True, markup=False)


@app.command()
def version() -> None:
    """Versions of fastres, torch and Python."""
    from fastres import doctor as examination

    found = examination.versions()
    print(f"fastres {found['fastres']}, torch {found['torch']}, Python {found['python']}")


if __name__ == "__main__":
    main()
