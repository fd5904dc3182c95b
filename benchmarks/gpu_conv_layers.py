"""Forward convolutions layer by layer (``gpu_stages.py``): the CUDA C++ kernel beside PyTorch's call and the others.

Each row is one convolution of ResNet-50 with what rides along in training (statistics) or in evaluation (bias,
residual, ReLU): microseconds of PyTorch's call with the passes that do the rest, of every tile of ours, and of the
likeliest configurations of the other backends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_conv import _in_processes, _verify
from torch.nn import functional as F

from fastres import tuning
from fastres.backends import cuda_conv
from fastres.codegen import plans
from fastres.problem import ConvProblem, ConvRequest

#: Configurations of every other backend that are timed.
PEERS = 2
BATCH = 64


def requests(network: plans.Network, device: int) -> list[ConvRequest]:
    """The distinct convolutions of residual blocks with their hooks, in the order of the network."""
    found = []
    for block in network.blocks:
        *first, last = block.chain
        found += [(p, ("bias", "relu")) for p in first]
        if block.projection is not None:
            found.append((block.projection, ("bias",)))
        found.append((last, ("bias", "relu", "residual")))
        found += [(p, ("stats",)) for p in block.convolutions]
    return [ConvRequest("fprop", p, "bfloat16", hooks, device) for p, hooks in dict.fromkeys(found)]


def contestants(request: ConvRequest) -> list[tuning.Choice]:
    """Every tile of ours, and what is likely to be the others' best."""
    ours = "emulator" if request.device < 0 else "cuda"
    found = []
    for choice in tuning.candidates(request)[1:]:
        rank = sum(c.backend == choice.backend for c in found)
        if choice.backend == ours or rank < PEERS:
            found.append(choice)
    return found


#: More tiles of pixels than an output's statistics have: merge_moments joins them.
MANY_TILES = ConvProblem(1, 2, 64 * 130, 8, 8, 1, 1)


def right(emit: Callable, device: torch.device, problems) -> bool:
    """Every tile on small integers, bit for bit; tensors end where they end, for whoever watches the addresses."""
    good = True
    index = device.index or 0 if device.type == "cuda" else -1
    for problem in problems:
        for dtype in ("bfloat16", "float16"):
            for config in cuda_conv.conv_candidates(ConvRequest("fprop", problem, dtype, (), index)):
                wrong = _wrong(problem, config, device, getattr(torch, dtype))
                good &= not wrong
                if wrong:
                    emit(kind="conv_fprop", problem=str(problem), config=str(config), status="failed", why=wrong)
    emit(kind="conv_fprop", status="ran", problems=len(problems))
    return good


def _wrong(p: ConvProblem, config, device: torch.device, dtype: torch.dtype) -> str:
    g = torch.Generator(device).manual_seed(0)

    def integers(*shape, dtype=dtype):
        t = torch.randint(-2, 3, shape, generator=g, device=device).to(dtype)
        return t.to(memory_format=torch.channels_last) if len(shape) == 4 else t

    x, w = integers(p.N, p.C, p.H, p.W), integers(p.K, p.C // p.groups, p.R, p.S)
    bias, residual = integers(p.K, dtype=torch.float32), integers(p.N, p.K, p.P, p.Q)
    plain = F.conv2d(x.double(), w.double(), bias.double(), *p.geometry) + 0.0
    out = torch.full_like(residual, float("nan"))
    cuda_conv.conv_fprop(x, w, p.geometry, out, bias=bias, residual=residual, relu=True, config=config)
    if not torch.equal(out, torch.relu((plain + residual.double()).to(dtype))):
        return "differs on integers"
    part = torch.full((3, cuda_conv.conv_parts("fprop", p, config), p.K), float("nan"), device=device)
    cuda_conv.conv_fprop(x, w, p.geometry, out, bias=bias, part=part, config=config)
    n, mean, _ = part.double()
    close = torch.allclose((n * mean).sum(0), out.double().sum((0, 2, 3)), rtol=1e-4, atol=1e-2)
    return "" if torch.equal(out, plain.to(dtype)) and close else "differs on integers with statistics"


def run(emit: Callable, rehearsal: bool) -> bool:
    if rehearsal:
        asked = requests(plans.network("resnet50", 1, 64), -1)[:2]
    else:
        asked = requests(plans.network("resnet50", BATCH), torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    pairs = [(request, choice) for request in asked for choice in contestants(request)]
    verdicts = [_verify(pair) for pair in pairs] if rehearsal else _in_processes(pairs)
    tuning.forget()  # the verdicts of other processes are on disk
    wrong = {(request, choice): why for request, choice, why in verdicts if why}
    for (request, choice), why in wrong.items():
        emit(kind="layer", request=request, choice=choice, status="failed", why=why)
    if not any(choice.backend in ("cuda", "emulator") for _, choice in pairs):
        emit(kind="layer", status="refused", why="; ".join(cuda_conv.why_not(asked[0])) or "no tile fits")
        return not wrong
    for request in asked:
        trial = tuning.trial_of(request)
        library = tuning.measured(trial, tuning.LIBRARY)
        served = [c for c in contestants(request) if (str(request), str(c)) not in wrong]
        times = {c: tuning.measured(trial, c) for c in served}
        best: dict[str, float] = {}
        for choice, us in times.items():
            best[choice.backend] = min(us, best.get(choice.backend, us))
        mine = best.get("emulator" if request.device < 0 else "cuda")
        emit(kind="layer", request=str(request), library_us=library, best_us=best,
             timings={str(c): us for c, us in times.items()}, tflops=mine and request.problem.flops / mine * 1e-6,
             ratio_to_library=mine and library / mine)  # fmt: skip
    return not wrong
