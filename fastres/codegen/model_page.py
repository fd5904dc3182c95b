"""The text of docs/kernels/model.md: the performance model's constants, its predictions and what they rest on."""

from __future__ import annotations

import statistics

from fastres.codegen import block_model, calibration, eval_model, model, one_pass_model, plans, rotated_model

_LEFT = ("plan", "block", "kernel", "reads", "writes", "bound", "work", "kernels", "of plan", "file", "contestant",
         "chip", "source", "layer")  # fmt: skip


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' if h in _LEFT else '--:' for h in head)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def chip_table() -> str:
    rows = [[c.name, f"{c.bandwidth / 1e12:.2f}", f"{c.rate / 1e12:.0f}", c.source] for c in model.CHIPS.values()]
    return markdown(["chip", "TB/s", "TFLOP/s", "source"], rows)


def modelled(entry: calibration.Measured, net: plans.Network) -> tuple[int, int, float]:
    """Launches, bytes and ms (on the H100) of the model's kernels that ``entry`` measured."""
    found = [k for b in net.blocks for k in plans.kernels(b, entry.plan)]
    stem = plans.stem_kernels(net, entry.plan)
    found = [k for k in [*found, *(k for k in stem if k.name != "pad")] if k.work == entry.work]
    return len(found), sum(k.bytes for k in found), model.add(found, model.CHIPS["h100"]).seconds * 1e3


def constants() -> str:
    net = plans.network()
    head = ["work", "kernels", "of plan", "launches", "GB", "ms measured", "TB/s", "constant", "ms modelled"]
    rows = []
    for entry in calibration.STEP:
        launches, size, ms = modelled(entry, net)
        if entry.work == "stem":
            flops = 2 * net.stem.flops
            rate, constant = f"{flops / entry.ms / 1e9:.0f} TFLOP/s", f"{calibration.STEM_RATE:g} of the rate"
        else:
            rate, constant = f"{size / entry.ms / 1e9:.2f}", f"{calibration.BANDWIDTH[entry.work]:g} of the copy"
        rows.append([entry.work, entry.what, entry.plan, f"{launches}", f"{size / 1e9:.1f}", f"{entry.ms:.2f}", rate,
                     constant, f"{ms:.2f}"])  # fmt: skip
    return markdown(head, rows)


def layers() -> list[tuple[str, str, float, float, str]]:
    """(layer, kind, us measured, us modelled, bound) of cuDNN's convolutions on the H100."""
    found = []
    for (C, K, H, R, stride), times in calibration.LAYERS.items():
        p = plans.conv(256, H, C, K, R, stride)
        for kind, us in zip(("fprop", "dgrad", "wgrad"), times, strict=True):
            t = model.time(plans.product(kind, p, "", "", ""), model.CHIPS["h100"])
            name = f"{C} -> {K}, {R}x{R}{f'/{stride}' if stride > 1 else ''} at {H}"
            found.append((name, kind, us, t.seconds * 1e6, t.bound))
    return found


def layer_table() -> str:
    rows: dict[str, list[str]] = {}
    for name, _, us, model_us, _ in layers():
        rows.setdefault(name, [name]).append(f"{us:.0f} / {model_us:.0f}")
    return markdown(["layer", "fprop", "dgrad", "wgrad"], list(rows.values()))


def weakest() -> str:
    """The layers where cuDNN takes more than 1.4 times the model's time, as a list."""
    return "\n".join(f"* {kind} of {name}: {us / m:.1f}x" for name, kind, us, m, _ in layers() if us > 1.4 * m)


def calibration_text() -> str:
    errors = sorted(abs(us / m - 1) for _, _, us, m, _ in layers())
    net = plans.network()
    chip = model.CHIPS["h100"]
    whole = []
    for plan, wall, kernels, launches in calibration.STEPS:
        s = model.step(net, plan, chip)
        whole.append([plans.LABELS[plan], f"{kernels:.1f}", f"{s.kernels:.1f}", f"{s.kernels / kernels - 1:+.0%}",
                      f"{launches}", f"{s.launches}", f"{wall:.1f}", f"{s.wall:.1f}"])  # fmt: skip
    head = ["plan", "kernels, ms", "modelled", "error", "launches", "modelled", "step, ms", "modelled"]
    return f"""## What the constants rest on

Source of every measured number below: {calibration.SOURCE}.
On another chip the same shares are assumed; nothing was measured there.

Passes over memory: a share of the copy bandwidth for each kind of kernel, the bytes of the model over the profiler's
time.

{constants()}
Convolutions, two constants: {calibration.EXPOSED:g} of the shorter of loading and multiplying is exposed, and below
{calibration.FULL_WIDTH} channels (the narrower side, per group) the tensor cores run at channels / \
{calibration.FULL_WIDTH} of their rate.
Against cuDNN's {len(errors)} kernels of ResNet-50, each alone: median error {statistics.median(errors):.0%}, nine in \
ten within {errors[int(0.9 * len(errors))]:.0%}. Bandwidth and
rate themselves are those of the chip, not fitted. Where cuDNN takes more than 1.4 times the model's time:

{weakest()}

<details><summary>cuDNN's time and the model's, us</summary>

{layer_table()}
</details>

Beside the modelled launches a step has {calibration.HELPERS["eager"]} small ones a convolution (casts, memsets, \
workspaces, running statistics), {calibration.HELPERS["fastres"]}
with BN kernels of ours (finalisation), of {calibration.HELPER_US:g} us. Between two launches {calibration.GAP_US:g} \
us pass: wall time less kernels of
eager and torch.compile, over their launches. A host slower than the GPU adds to that: fastres as measured here was
bound by its host, so its step is no check of the model; its kernels are. No constant was taken from the kernels of
torch.compile: that row tests the model, the other two partly repeat what it was made from.

{markdown(head, whole)}"""


def text() -> str:
    net = plans.network()
    chips = list(model.CHIPS.values())
    parts = [
        f"""# Performance model: ResNet-50 training

Generated by `python -m fastres.codegen model`, which prints the same for any chip, batch and torchvision ResNet
(`--chip a100-80 --batch 64 --model resnet101`). Do not edit. {net.name}, batch {net.batch}, {net.size} x {net.size}, \
bfloat16, channels_last.

**These are predictions, not measurements**, except where a table says measured. A kernel takes

    longer + exposed * shorter,   of   bytes / (bandwidth * share)   and   FLOPs / (rate * share)

and the longer of the two is its bound. Kernels run one after the other; caches, host time and the cost of an epilogue
beyond its bytes are left out. So the fused plans are what their traffic allows, not what a first kernel reaches.

{chip_table()}
## Plans

`fastres/codegen/plans.py` lists every launch with what it reads and writes.

* **eager**: PyTorch, channels_last, autocast. **compile**: torch.compile.
* **fastres**: the block engine on cuDNN's convolutions: BN kernels fused, statistics a pass of their own, the
  residual's gradient joined by `mask_add`.
* **A'**: statistics in the fprop epilogue; ReLU mask, BN reductions and the recomputed activation in the dgrad
  epilogue; the residual's gradient added in the first convolution's dgrad.
* **A**: A' with operand prologues (normalise and ReLU, and the affine map of the BN gradient, while loading). In
  dgrad and wgrad of the last convolution the prologue reads the ReLU's bits; behind a projection both BN gradients are
  written by one pass. An upper bound: the engine forms an operand so only where `fastres.tune` measured it faster.
"""
    ]
    for chip in chips:
        parts.append(f"## Whole step, {chip.name}\n\nms of kernels by part; step: with the gaps between launches.\n")
        parts.append(markdown(*model.step_table(net, chip)))
        rows = model.measured(net, chip)
        if rows:
            parts += ["Measured:\n", markdown(*model.measured_table(rows))]
    parts.append("![Roofline of the stages](roofline-resnet50.png)\n")
    for chip in chips[:2]:
        parts.append(
            f"## Blocks, {chip.name}\n\nForward and backward. units: activations in Cm elements a pixel of the block's "
            "output, Cm the channels of its\nfirst convolution; MB: weights included.\n"
        )
        parts.append(markdown(*model.block_table(net, chip)))
    parts.append(one_pass_model.text(markdown))
    parts.append(block_model.text(markdown))
    parts.append(eval_model.text(markdown))
    parts.append(rotated_model.text(markdown))
    parts.append(calibration_text())
    block = next(b for b in net.blocks if b.projection is None)
    parts.append(f"## Kernels of {block.name}, {chips[0].name}\n\nA block without projection, in order of launch.\n")
    for plan in plans.PLANS:
        total = model.add(plans.kernels(block, plan), chips[0], block.unit)
        summary = f"{plan}: {total.launches} launches, {total.units:.2f} units, {total.seconds * 1e6:,.0f} us"
        table = markdown(*model.kernel_table(block, plan, chips[0]))
        parts.append(f"<details><summary>{summary}</summary>\n\n{table}\n</details>\n")
    return "\n".join(parts)
