"""The kernels of one ResNet training step, plan by plan: what each reads, writes and multiplies.

A plan is a way to run a residual block, forward and backward. `kernels` lists its launches over one block in order;
nothing here knows how fast a chip is (`model` does). Counted are activations, masks, indices and the convolutions' own
weights, every buffer once a launch: no halo, no cache. Per-channel vectors are left out; they are small.

eager     PyTorch with channels_last and autocast: every module a kernel or two.
compile   torch.compile: pointwise work fused into one reduction and one map per BN. Read off its kernels' times.
fastres   `ops/engine.py` as it is on library convolutions: statistics a pass of their own.
A'        statistics in the fprop epilogue; ReLU mask, reductions and the recomputed activation in the dgrad epilogue,
          the residual's gradient in the first dgrad's.
A         A' with operand prologues: inner activations and BN gradients are never written. The prologue of the last
          convolution reads the ReLU's bits. Behind a projection both BN gradients are written by one pass, as in A'.
          An upper bound: `ops/engine.py` forms an operand while loading where that was measured to be faster.
"""

from __future__ import annotations

import dataclasses

from fastres.problem import ConvProblem

PLANS = ("eager", "compile", "fastres", "A'", "A")
LABELS = {"eager": "PyTorch eager", "compile": "torch.compile", "fastres": "fastres, BN kernels"}
STEM, HEAD = "stem", "head"

_B, _W = "basic", "bottleneck"
#: torchvision's models: block, blocks per stage, groups, width per group.
MODELS = {
    "resnet18": (_B, (2, 2, 2, 2), 1, 64),
    "resnet34": (_B, (3, 4, 6, 3), 1, 64),
    "resnet50": (_W, (3, 4, 6, 3), 1, 64),
    "resnet101": (_W, (3, 4, 23, 3), 1, 64),
    "resnet152": (_W, (3, 8, 36, 3), 1, 64),
    "resnext50_32x4d": (_W, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (_W, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (_W, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": (_W, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": (_W, (3, 4, 23, 3), 1, 128),
}
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor in memory; ``weight``: not counted in units of the activations."""

    name: str
    bytes: int
    weight: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch. ``width``: channels of the narrower side of a product, per group. ``work``, which decides the speed:

    conv        a product on the tensor cores          stem   the first convolution, of three channels
    bn stats    PyTorch's reduction for statistics     bn     its other BN kernels        map   its elementwise kernels
    fused       passes of torch.compile and of ours    pool   PyTorch's max pooling       fused pool   ours
    """

    name: str
    work: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    flops: int = 0
    width: int = 0

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in (*self.reads, *self.writes))

    @property
    def activation_bytes(self) -> int:
        return sum(b.bytes for b in (*self.reads, *self.writes) if not b.weight)


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order, and the projection of the shortcut or None."""

    name: str
    stage: int
    chain: tuple[ConvProblem, ...]
    projection: ConvProblem | None

    @property
    def convolutions(self) -> tuple[ConvProblem, ...]:
        return self.chain if self.projection is None else (*self.chain, self.projection)

    @property
    def unit(self) -> int:
        """Bytes of Cm elements a pixel of the output, Cm being the channels of the first convolution; bf16."""
        last = self.chain[-1]
        return 2 * last.N * last.P * last.Q * self.chain[0].K

    @property
    def flops(self) -> int:
        """Of fprop, dgrad and wgrad."""
        return 3 * sum(p.flops for p in self.convolutions)


@dataclasses.dataclass(frozen=True)
class Network:
    name: str
    batch: int
    size: int
    stem: ConvProblem
    blocks: tuple[Block, ...]

    @property
    def convolutions(self) -> tuple[ConvProblem, ...]:
        return (self.stem, *(p for b in self.blocks for p in b.convolutions))

    @property
    def parameters(self) -> int:
        weights = sum(p.elements[1] + 2 * p.K for p in self.convolutions)
        return weights + (self.blocks[-1].chain[-1].K + 1) * CLASSES


def conv(N: int, H: int, C: int, K: int, R: int = 1, stride: int = 1, groups: int = 1) -> ConvProblem:
    """A square convolution of C to K channels over N images of H x H, padded so that stride 1 keeps the size."""
    pad = R // 2
    return ConvProblem(N, H, H, C, K, R, R, (stride, stride), (pad, pad), (1, 1), groups)


def network(name: str = "resnet50", batch: int = 256, size: int = 224) -> Network:
    """Raises ``ValueError`` for a model that is not in `MODELS`, a batch below 1 or images below 32 pixels."""
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if size < 32:
        raise ValueError(f"size: got {size}, expected at least 32 pixels")
    kind, layers, groups, base = MODELS[name]
    stem = conv(batch, size, 3, 64, R=7, stride=2)
    H, C, blocks = (stem.P - 1) // 2 + 1, 64, []
    for stage, depth in enumerate(layers, 1):
        planes = 32 << stage
        for index in range(depth):
            stride = 2 if index == 0 and stage > 1 else 1
            if kind == _B:
                K = planes
                first = conv(batch, H, C, K, 3, stride)
                chain = (first, conv(batch, first.P, K, K, 3))
            else:
                K, width = 4 * planes, planes * base // 64 * groups
                middle = conv(batch, H, width, width, 3, stride, groups)
                chain = (conv(batch, H, C, width), middle, conv(batch, middle.P, width, K))
            projection = conv(batch, H, C, K, 1, stride) if index == 0 and (stride > 1 or C != K) else None
            blocks.append(Block(f"layer{stage}.{index}", stage, chain, projection))
            H, C = chain[-1].P, K
    return Network(name, batch, size, stem, tuple(blocks))


# ---- kernels


def _w(p: ConvProblem, name: str = "w") -> Buffer:
    return Buffer(name, 2 * p.elements[1], weight=True)


def _x(p: ConvProblem, name: str) -> Buffer:
    return Buffer(name, 2 * p.elements[0])


def _y(p: ConvProblem, name: str) -> Buffer:
    return Buffer(name, 2 * p.elements[2])


def _read(p: ConvProblem, kind: str, name: str) -> Buffer:
    """The part of x that a convolution touches: a strided 1x1 skips pixels, and its cache lines with them."""
    touched = p.elements[0]
    if kind != "dgrad" and p.R < p.stride[0] and p.S < p.stride[1]:
        touched = p.N * p.P * p.Q * p.C
    return Buffer(name, 2 * touched)


def product(kind: str, p: ConvProblem, label: str, source: str, result: str, reads=(), writes=()) -> Kernel:
    """fprop: ``source`` -> ``result``. dgrad: gradient ``source`` -> ``result``. wgrad: ``source`` is the gradient,
    ``result`` the convolution's input. ``reads`` and ``writes``: what rides along."""
    width = min(p.C, p.K) // p.groups
    if kind == "fprop":
        own, made = (_read(p, kind, source), _w(p)), (_y(p, result),)
    elif kind == "dgrad":
        own, made = (_y(p, source), _w(p)), (_x(p, result),)
    else:
        own, made = (_y(p, source), _read(p, kind, result)), (_w(p, "dw"),)
    return Kernel(f"{label} {kind}", "conv", (*own, *reads), (*made, *writes), p.flops, width)


def _pass(name: str, reads: tuple, writes: tuple = (), work: str = "fused") -> Kernel:
    return Kernel(name, work, tuple(b for b in reads if b), tuple(b for b in writes if b))


def kernels(block: Block, plan: str) -> list[Kernel]:
    """The launches of ``plan`` over one block, forward then backward. Raises ``ValueError`` for an unknown plan."""
    if plan not in PLANS:
        raise ValueError(f"plan: got {plan!r}, expected one of {', '.join(PLANS)}")
    if plan in ("eager", "compile"):
        return _unfused(block, plan == "compile")
    return _fused(block, epilogues=plan != "fastres", prologues=plan == "A")


def _unfused(block: Block, compiled: bool) -> list[Kernel]:
    chain, q, last = block.chain, block.projection, len(block.chain) - 1
    x, out, g = _x(chain[0], "x"), _y(chain[-1], "out"), _y(chain[-1], "g")
    stats, bn, elementwise = ("fused",) * 3 if compiled else ("bn stats", "bn", "map")
    found = []
    for i, p in enumerate(chain):
        a, h = _y(p, f"a{i + 1}"), _y(p, f"h{i + 1}")
        found.append(product("fprop", p, f"conv{i + 1}", f"h{i}" if i else "x", a.name))
        found.append(_pass(f"bn{i + 1} statistics", (a,), work=stats))
        if i < last:
            found.append(_pass(f"bn{i + 1} + ReLU" if compiled else f"bn{i + 1}", (a,), (h,), bn))
            if not compiled:
                found.append(_pass(f"relu{i + 1}", (h,), (h,), elementwise))
    own, dap = (_y(q, "ap"), _y(q, "dap")) if q else (None, None)
    if q:
        found.append(product("fprop", q, "projection", "x", "ap"))
        found.append(_pass("projection's BN statistics", (own,), work=stats))
    if compiled:
        found.append(_pass(f"bn{last + 1} + shortcut + ReLU", (a, own or x), (out,)))
    else:
        found.append(_pass(f"bn{last + 1}", (a,), (out,), bn))
        if q:
            found.append(_pass("projection's BN", (own,), (own,), bn))
        found.append(_pass("add", (out, own or x), (out,), elementwise))
        found.append(_pass("relu", (out,), (out,), elementwise))

    da = _y(chain[-1], "da")
    if compiled:
        # The mask comes from the saved activation in both kernels. Where the joined gradient is not written, these two
        # read its parts instead, and the next block's write it: on average the same bytes.
        found.append(_pass(f"ReLU, bn{last + 1} backward, sums", (g, out, a, own)))
        found.append(_pass(f"ReLU, bn{last + 1} backward", (g, out, a, own), (da, dap)))
    else:
        found.append(_pass("relu backward", (g, out), (g,), elementwise))
        for b, name in ((a, f"bn{last + 1}"), (own, "projection's BN")):
            if b:
                found.append(_pass(f"{name} backward, sums", (g, b), work=bn))
                found.append(_pass(f"{name} backward", (g, b), (da if b is a else dap,), bn))
    for i in range(last, -1, -1):
        p = chain[i]
        found.append(product("dgrad", p, f"conv{i + 1}", "da", "dh" if i else "dx"))
        found.append(product("wgrad", p, f"conv{i + 1}", "da", f"h{i}" if i else "x"))
        if i:
            dh, h, a = _x(p, "dh"), _x(p, f"h{i}"), _x(p, f"a{i}")
            mask = (h,) if compiled else ()
            if not compiled:
                found.append(_pass(f"relu{i} backward", (dh, h), (dh,), elementwise))
            found.append(_pass(f"bn{i} backward, sums", (dh, *mask, a), work=bn))
            found.append(_pass(f"bn{i} backward", (dh, *mask, a), (_x(p, "da"),), bn))
    if q:
        found.append(product("dgrad", q, "projection", "dap", "dx'"))
        found.append(product("wgrad", q, "projection", "dap", "x"))
    found.append(_pass("gradients joined", (_x(chain[0], "dx"), _x(chain[0], "dx'" if q else "g")), (x,), elementwise))
    return found


def _fused(block: Block, epilogues: bool, prologues: bool) -> list[Kernel]:
    chain, q, last = block.chain, block.projection, len(block.chain) - 1
    x, dx, out, g = _x(chain[0], "x"), _x(chain[0], "dx"), _y(chain[-1], "out"), _y(chain[-1], "g")
    mask = Buffer("mask", out.bytes // 16)
    found = []

    def statistics(p, a):
        if not epilogues:
            found.append(_pass(f"bn_stats of {a}", (_y(p, a),)))

    for i, p in enumerate(chain):
        a = _y(p, f"a{i + 1}")
        source = "x" if not i else f"a{i}" if prologues else f"h{i}"
        found.append(product("fprop", p, f"conv{i + 1}", source, a.name))
        statistics(p, a.name)
        if i < last and not prologues:
            found.append(_pass(f"bn_apply {i + 1}", (a,), (_y(p, f"h{i + 1}"),)))
    own = dap = None
    if q:
        own, dap = _y(q, "ap"), _y(q, "dap")
        found.append(product("fprop", q, "projection", "x", "ap"))
        statistics(q, "ap")
    found.append(_pass("bn_apply, shortcut, mask", (a, own or x), (out, mask)))

    # Backward. ``pre``: what a prologue reads beside the gradient itself to form da.
    found.append(_pass("bn_bwd_reduce", (g, a, mask, own)))
    source, pre = "da", ()
    if prologues and not q:
        source, pre = "g", (a, mask)
    else:
        found.append(_pass("bn_bwd_apply", (g, a, mask, own), (_y(chain[-1], "da"), dap)))
    for i in range(last, 0, -1):
        p = chain[i]
        dy, a, h = _x(p, "dy"), _x(p, f"a{i}"), _x(p, f"h{i}")
        rides, extra = ((a,), () if prologues else (h,)) if epilogues else ((), ())
        found.append(product("dgrad", p, f"conv{i + 1}", source, "dy", (*pre, *rides), extra))
        if not epilogues:
            found.append(_pass(f"bn_bwd_reduce {i}, h{i}", (dy, a), (h,)))
        found.append(product("wgrad", p, f"conv{i + 1}", source, f"a{i}" if prologues else f"h{i}", pre))
        if prologues:
            source, pre = "dy", (a,)
        else:
            found.append(_pass(f"bn_bwd_apply {i}", (dy, a), (dy,)))
    p = chain[0]
    found.append(product("wgrad", p, "conv1", source, "x", pre))
    if q:
        found.append(product("wgrad", q, "projection", "dap", "x"))
        found.append(product("dgrad", q, "projection", "dap", "dx'"))
    if epilogues:
        shortcut = (_x(p, "dx'"),) if q else (g, mask)
        found.append(product("dgrad", p, "conv1", source, "dx", (*pre, *shortcut)))
    else:
        found.append(product("dgrad", p, "conv1", source, "dx"))
        found.append(_pass("add", (dx, _x(p, "dx'")), (dx,)) if q else _pass("mask_add", (dx, g, mask), (dx,)))
    return found


def stem_kernels(net: Network, plan: str) -> list[Kernel]:
    """Convolution, BN, ReLU and max pooling in front of the blocks, and their backward; the image needs no gradient."""
    p = net.stem
    pooled = 2 * net.blocks[0].chain[0].elements[0]
    image, weight = Buffer("image", 2 * p.elements[0]), _w(p)
    padded = Buffer("image, 8 channels", 2 * p.elements[0] // 3 * 8)
    a, h, out, g = _y(p, "a"), _y(p, "h"), Buffer("out", pooled), Buffer("g", pooled)

    def first(kind, reads, writes):
        return Kernel(f"stem {kind}", "stem", reads, writes, p.flops)

    # cuDNN pads three channels to eight.
    found = [_pass("pad", (image,), (padded,)), first("fprop", (padded, weight), (a,))]
    back = [_pass("pad", (image,), (padded,)), first("wgrad", (a, padded), (weight,))]
    if plan not in ("eager", "compile"):
        idx = Buffer("idx", pooled // 2)
        found += [_pass("bn_stats", (a,)), _pass("stem_fwd", (a,), (out, idx), "fused pool")]
        found.append(_pass("stem_bwd_reduce", (g, idx, a), (), "fused pool"))
        return [*found, _pass("stem_bwd_apply", (g, idx, a), (a,), "fused pool"), *back]
    compiled = plan == "compile"
    stats, bn = ("fused", "fused") if compiled else ("bn stats", "bn")
    idx = Buffer("idx", pooled // 2 if compiled else 4 * pooled)
    found += [_pass("bn statistics", (a,), work=stats), _pass("bn", (a,), (h,), bn)]
    mask = (h,) if compiled else ()
    if not compiled:
        found.append(_pass("relu", (h,), (h,), "map"))
    found += [_pass("pool", (h,), (out, idx), "pool"), _pass("pool backward", (g, idx), (h,), "pool")]
    if not compiled:
        found.append(_pass("relu backward", (h, h), (h,), "map"))
    found += [_pass("bn backward, sums", (h, *mask, a), work=bn), _pass("bn backward", (h, *mask, a), (h,), bn)]
    return [*found, *back]


def head_kernels(net: Network) -> list[Kernel]:
    """Pooling, classifier, weight casts of autocast and SGD with momentum: the same in every plan."""
    last = net.blocks[-1].chain[-1]
    features, feature = _y(last, "features"), Buffer("feature", 2 * net.batch * last.K)
    weights = sum(p.elements[1] for p in net.convolutions)
    fp32, bf16 = Buffer("weights, fp32", 4 * weights, True), Buffer("weights, bf16", 2 * weights, True)
    state = Buffer("parameters", 4 * net.parameters, True)
    fc = Buffer("fc", 2 * last.K * CLASSES, True)
    logits = Buffer("logits", 2 * net.batch * CLASSES)
    found = [_pass("average pool", (features,), (feature,)), _pass("average pool backward", (feature,), (features,))]
    flops = 2 * net.batch * last.K * CLASSES
    for kind, reads, writes in (("fprop", (feature, fc), (logits,)), ("dgrad", (logits, fc), (feature,)),
                                ("wgrad", (logits, feature), (fc,))):  # fmt: skip
        found.append(Kernel(f"fc {kind}", "conv", reads, writes, flops, min(last.K, CLASSES)))
    found += [_pass("weights cast", (fp32,), (bf16,)), _pass("gradients cast", (bf16,), (fp32,))]
    return [*found, _pass("SGD", (state,) * 3, (state,) * 2)]
