"""The graphs of the cuDNN backend mean what the reference does.

There is no GPU here: graphs run through ``fake_cudnn.py``, which executes them on CPU memory. Where the real package is
installed its own builder also checks every graph, up to the point where a device would be needed.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from cudnn_cases import H100, POINT, PROBLEMS, SERVED, SQUARE, case, launch

from fastres.backends import cudnn, cudnn_graphs, reference, reference_conv
from fastres.backends.cudnn_graphs import GraphConfig
from fastres.problem import HOOKS, ConvRequest

REAL = importlib.util.find_spec("cudnn") is not None


pytestmark = pytest.mark.usefixtures("cudnn_anew")


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind, hooks", SERVED, ids=lambda v: v if isinstance(v, str) else "+".join(v) or "alone")
def test_graphs_mean_what_the_reference_does(fake, kind, hooks, dtype, p):
    request = ConvRequest(kind, p, str(dtype).removeprefix("torch."), hooks, 0)
    if cudnn_graphs.why_not(request):
        assert cudnn.candidates(request) == ()
        return
    arguments, truth = case(kind, hooks, p, dtype)
    getattr(reference_conv, f"conv_{kind}")(**arguments, **truth)
    for wording in cudnn_graphs.wordings(request):
        arguments, outputs = case(kind, hooks, p, dtype)
        launch(kind, arguments, outputs, wording)
        eps = torch.finfo(dtype).eps
        # Narrow vectors move every activation by a rounding of its terms.
        slack = 8 if wording.vectors == "activation" else 1
        for key, ours in outputs.items():
            scale = truth[key].double().abs().amax((1, 2) if key == "part" else None, keepdim=True)
            error = ((ours.double() - truth[key].double()).abs() / scale.clamp(min=1e-6)).max().item()
            assert error <= 2 * eps * slack, f"{key} in the wording {wording}: off by {error:.3g}"


def test_wgrad_in_float32(fake):
    arguments, outputs = case("wgrad", (), SQUARE, torch.bfloat16)
    outputs["dw"] = outputs["dw"].float()
    launch("wgrad", arguments, outputs, GraphConfig())
    exact = torch.empty_like(outputs["dw"], dtype=torch.float64)
    arguments["geometry"], wide = SQUARE.geometry, {k: v.double() for k, v in arguments.items() if k != "geometry"}
    reference_conv.conv_wgrad(**wide, geometry=SQUARE.geometry, dw=exact)
    torch.testing.assert_close(outputs["dw"].double(), exact, rtol=1e-5, atol=1e-5)


def test_part_finalizes(fake):
    """What a BN makes of count, mean and M2 of one tile is what it makes of the reference's."""
    arguments, outputs = case("fprop", ("stats",), SQUARE, torch.float16)
    launch("fprop", arguments, outputs, GraphConfig(sums="reductions"))
    out, ours, right = outputs["out"], torch.empty(5, SQUARE.K), torch.empty(5, SQUARE.K)
    part = torch.empty(3, 4, SQUARE.K)
    reference.bn_stats(out, out.numel() // SQUARE.K, SQUARE.K, 4, part)
    reference.bn_finalize(part, 4, SQUARE.K, None, None, 1e-5, right)
    reference.bn_finalize(outputs["part"], 1, SQUARE.K, None, None, 1e-5, ours)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_vanishing_variance_is_not_negative(fake):
    arguments, outputs = case("fprop", ("stats",), POINT, torch.float16)
    arguments["x"].fill_(1.1)  # every pixel the same, so every output channel a constant
    launch("fprop", arguments, outputs, GraphConfig(sums="reductions"))
    count, mean, m2 = outputs["part"][:, 0]
    assert count.eq(72).all() and m2.ge(0).all()
    assert (m2 <= 72 * mean.square() * 2**-20).all()


def test_every_hook_has_a_say():
    """A hook added to ``problem.HOOKS`` is either drawn or refused."""
    drawn = {(kind, hook) for kind, hooks in SERVED for hook in hooks}
    refused = {("dgrad", "mask"), ("dgrad", "bits"), ("wgrad", "pre"), ("wgrad", "bits")}
    assert {(kind, hook) for kind, hooks in HOOKS.items() for hook in hooks} == drawn | refused


# ---- the real package


@pytest.mark.skipif(not REAL, reason="nvidia-cudnn-frontend is not installed (pip install fastres[cudnn])")
@pytest.mark.parametrize("kind, hooks", SERVED, ids=lambda v: v if isinstance(v, str) else "+".join(v) or "alone")
def test_the_package_accepts_the_graphs(kind, hooks):
    """Validation and lowering to cuDNN's own descriptors; which engine takes them needs a driver."""
    import cudnn as package

    properties = package.create_device_properties(json.dumps(H100))
    types = package.data_type
    for p in PROBLEMS:
        for dtype, io in (("bfloat16", types.BFLOAT16), ("float16", types.HALF)):
            request = ConvRequest(kind, p, dtype, hooks, 0)
            for wording in () if cudnn_graphs.why_not(request) else cudnn_graphs.wordings(request):
                graph = package.pygraph(
                    name=str(request),
                    io_data_type=io,
                    intermediate_data_type=types.FLOAT,
                    compute_data_type=types.FLOAT,
                    device_property=properties,
                )
                drawing = cudnn_graphs.Drawing(package, graph, dtype)
                cudnn_graphs.draw(drawing, request, wording)
                graph.validate()
                graph.build_operation_graph()
                needed = {t.uid for t in (*graph.get_inputs(), *graph.get_outputs())}
                assert needed == set(drawing.uids.values()), "what a launch passes is what the graph asks for"
