"""What the tests of one-kernel evaluation blocks share: a 3x3 of one tap, and a block that goes through its kernel."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

import fastres


def check_reasons(reasons: list[str], words: str) -> None:
    """``words``, a pattern, are among the reasons; "": there is none."""
    if words:
        assert re.search(words, "; ".join(reasons)), reasons
    else:
        assert reasons == []


def one_tap(C: int, H: int, W: int, tap: int):
    """(x, weight of a 1x1 that copies, weight of a 3x3 that moves the image by one pixel, what moves it in float64)."""
    x = torch.randn(1, C, H, W, generator=torch.Generator().manual_seed(tap)).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    one = torch.eye(C, dtype=torch.bfloat16)[:, :, None, None]
    w = torch.zeros(C, C, 3, 3, dtype=torch.bfloat16)
    w[:, :, tap // 3, tap % 3] = one[:, :, 0, 0]
    return x, one, w, lambda y: nn.functional.pad(y, (1, 1, 1, 1))[:, :, tap // 3 :, tap % 3 :][:, :, :H, :W]


def moving_bottleneck(C: int, H: int, W: int, tap: int):
    """(x, weights, bias, expected) of a bottleneck whose 3x3 moves relu(x + 1): zeros come from outside although
    relu(bias) is not zero."""
    x, one, w2, moved = one_tap(C, H, W, tap)
    y = torch.relu(x.double() + 1).to(torch.bfloat16).double()
    bias = torch.cat((torch.full((C,), 1.0), torch.zeros(2 * C)))
    return x, (one, w2, one), bias, torch.relu(moved(y) + x.double()).to(torch.bfloat16)


def ready(block: nn.Module) -> nn.Module:
    """``block`` in bfloat16 and evaluation, its weights folded, with statistics that matter."""
    block = block.to(torch.bfloat16).eval()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.running_mean), nn.init.normal_(m.bias)
    block._fastres_fold = True
    return block


def uses_kernel(block: nn.Module, x: torch.Tensor, emulator, name: str, monkeypatch) -> None:
    """A folded block in evaluation is one launch of ``name``, right, packed once, and packed anew after a change."""
    calls = []
    inner = getattr(emulator, name)
    monkeypatch.setattr(emulator, name, lambda *a: (calls.append(a), inner(*a)))
    with torch.no_grad(), fastres.backend("emulator"):
        out, again = block(x), block(x.to(memory_format=torch.channels_last))
    assert len(calls) == 2 and calls[0][1] is calls[1][1], "the packed weights are kept"
    assert out.is_contiguous() and torch.equal(out, again)
    truth = copy.deepcopy(block).double()
    truth._fastres_fold = False
    with torch.no_grad(), fastres.backend("reference"):
        expected = truth(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-5, atol=2**-5 * expected.abs().max().item())
    with torch.no_grad(), fastres.backend("emulator"):
        block.conv2.weight.mul_(0)  # noticed: packed anew
        assert not torch.equal(block(x), out) and calls[2][1] is not calls[0][1]
        calls.clear()
        block.float()(x.float())
    assert not calls, "float32 goes to separate convolutions"
