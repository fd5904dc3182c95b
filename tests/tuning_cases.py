"""What plays the convolution kernels in the tests of the tuning: the reference, with planted errors."""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch

import fastres
from fastres.backends import reference_conv
from fastres.models import resnet18
from fastres.problem import HOOKS, ConvProblem, ConvRequest, OperandRequest

PROBLEM = ConvProblem(5, 6, 5, 8, 12, 3, 3, padding=(1, 1))
STATS = ConvRequest("fprop", PROBLEM, "float32", ("stats",))
DGRAD = ConvRequest("dgrad", PROBLEM, "float16", ("act", "add", "mask", "reduce", "y"), device=-1)

OPERANDS = OperandRequest("backward", PROBLEM, "bfloat16", ("prologue", "pre"), ("act", "bits", "reduce"))


@dataclass(frozen=True)
class Config:
    """What plays a row of conv_configs: ``name`` picks the planted error."""

    name: str = "right"
    BM: int = 30
    patch: tuple = ()

    def __str__(self) -> str:
        return self.name


def kernels(damage=None, tiles: int = 3) -> types.SimpleNamespace:
    """A backend that computes what the reference does; ``damage[config.name](outputs, inputs)`` alters that."""
    fake = types.SimpleNamespace(ran=[], offered=(Config(),))
    damages = damage or {}

    def launch(kind):
        def conv(a, b, geometry, main, *, config, **rest):
            fake.ran.append((kind, config.name, a.shape[0]))
            getattr(reference_conv, f"conv_{kind}")(a, b, geometry, main, **rest)
            if config.name in damages:
                damages[config.name]({"main": main, **rest}, (a, b))

        return conv

    for kind in HOOKS:
        setattr(fake, f"conv_{kind}", launch(kind))
    fake.conv_parts = lambda kind, problem, config: tiles
    fake.conv_candidates = lambda request: fake.offered
    return fake


def missing_product(out, inputs):
    out["main"][0, 0, 0, 0] -= 1.0


class Timer:
    """Microseconds by name of the choice."""

    def __init__(self, **us):
        self.us = us

    def __call__(self, trial, module, config, runs=15):
        return self.us["library" if module is None else config.name]


def model():
    return fastres.fuse(torch.nn.Sequential(resnet18().layer1, torch.nn.Dropout(0.5)))
