"""What basic blocks and bottlenecks are tested on alike; each op's file names itself and its number of convolutions."""

from __future__ import annotations

import public_cases
import pytest
import torch
from kernel_cases import NAMES

import fastres
from fastres import testing
from fastres.ops import engine
from fastres.ops.batch_norm_act import batch_norm_act_ref
from fastres.ops.conv_bn_act import conv_ref

CONFIGURATIONS = dict(testing.block_configurations())


def make(op: str, configuration="projection", dtype=torch.float32, layout="nhwc", batch=2, size=(7, 6), **conv) -> dict:
    """Arguments of ``fastres.<op>``; no pre-activation of any ReLU within rounding distance of zero."""
    c = CONFIGURATIONS[configuration]
    conv = dict(bias=c.get("bias", False), dtype=dtype, **conv)
    spatial = dict(dilation=c["dilation"], groups=c["groups"])
    x = testing.fill((batch, c["C"], *size), dtype, seed=1)
    if op == "bottleneck":
        convs = (
            testing.make_conv(c["C"], c["width"], 1, seed=2, **conv),
            testing.make_conv(c["width"], c["width"], 3, stride=c["stride"], seed=3, **spatial, **conv),
            testing.make_conv(c["width"], c["K"], 1, seed=4, **conv),
        )
    else:
        width = c["K"]
        convs = (
            testing.make_conv(c["C"], width, 3, stride=c["stride"], seed=2, **spatial, **conv),
            testing.make_conv(width, c["K"], 3, dilation=c["dilation"], seed=3, **conv),
        )
    shortcut = testing.make_conv(c["C"], c["K"], 1, stride=c["stride"], seed=5, **conv) if c["projection"] else None
    args = dict(x=x, convs=convs, shortcut=shortcut)
    if batch:
        _keep_clear(args)
    args["x"] = testing.lay_out(x, layout).requires_grad_()
    return args


def _keep_clear(args: dict) -> None:
    """Biases shifted BN by BN so that zero lies in a gap of every channel, in float64."""
    with torch.no_grad():
        wide = public_cases.widened(args)
        h = wide["x"]
        for i, conv in enumerate(args["convs"]):
            last = i == len(args["convs"]) - 1
            a = conv_ref(h, wide["convs"][i])
            pre = batch_norm_act_ref(a, wide["convs"][i].bn, relu=False)
            if last:
                r = wide["x"]
                if args["shortcut"] is not None:
                    r = conv_ref(r, wide["shortcut"])
                    r = batch_norm_act_ref(r, wide["shortcut"].bn, relu=False)
                pre = pre + r
            before = conv.bn.bias.double()
            testing.clear_of_zero(pre, conv.bn.bias)
            h = torch.relu(pre + (conv.bn.bias.double() - before)[:, None, None])


def terms(args) -> int:
    """Products in an output of the widest convolution, plus rows of a reduction."""
    N, _, H, W = args["x"].shape
    return max(c.weight[0].numel() for c in args["convs"]) + N * H * W


def norms(dtype):
    # In 16 bits the convolutions' own rounding flips ReLUs: compared in the mean, where PyTorch flips as many.
    return ("max", "rms") if dtype in (torch.float32, torch.float64) else ("rms",)


class BlockTests:
    """Subclasses set ``op`` and ``reference``."""

    op: str
    reference: staticmethod

    @property
    def fn(self):
        return getattr(fastres, self.op)

    def make(self, *args, **kwargs):
        return make(self.op, *args, **kwargs)

    @pytest.mark.parametrize("configuration", CONFIGURATIONS)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_against_pytorch(self, backend, configuration, training):
        args = self.make(configuration, training=training)
        public_cases.compare(self.fn, self.reference, args, terms=terms(args))

    # Dtype and geometry are independent: the two kinds of shortcut suffice.
    @pytest.mark.parametrize("configuration", ["identity", "strided"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=NAMES.get)
    def test_dtypes(self, backend, dtype, configuration):
        args = self.make(configuration, dtype, size=(12, 11))
        public_cases.compare(self.fn, self.reference, args, terms=terms(args), norms=norms(dtype))

    @pytest.mark.parametrize("configuration", ["identity", "strided", "biased"])
    def test_low_memory(self, backend, configuration):
        """The same gradients to the bit, from fewer bytes."""
        args = self.make(configuration)
        grad = public_cases._incoming(self.fn, args)
        low = public_cases.outcome(self.fn, args, grad=grad, memory="low")
        public_cases._same(low, public_cases.outcome(self.fn, args, grad=grad), 'with memory="low"')
        saved = {m: public_cases.saved_bytes(self.fn, args, memory=m) for m in ("default", "low")}
        eager = public_cases.saved_bytes(self.reference, args)
        assert saved["low"] < saved["default"] < eager, (saved, eager)

    @pytest.mark.parametrize("layout", ["nchw", "permuted", "sliced", "misaligned"])
    def test_layouts(self, backend, layout):
        args = self.make("projection", layout=layout)
        got = public_cases.compare(self.fn, self.reference, args, terms=terms(args))
        channels_last = args["x"].is_contiguous(memory_format=torch.channels_last)
        assert got.out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def test_empty_batch(self, backend):
        for configuration in ("identity", "strided"):
            public_cases.check_empty_batch(self.fn, self.reference, self.make(configuration, batch=0))

    @pytest.mark.parametrize("dtype", [torch.float64], ids=NAMES.get)
    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_gradcheck(self, backend, dtype, memory):
        args = self.make("biased", dtype, batch=2, size=(3, 3))
        convs = args["convs"]
        flat = [args["x"]]
        for conv in convs:
            flat += [conv.weight, conv.bias, conv.bn.weight, conv.bn.bias]

        def call(x, *p):
            units = [
                c._replace(weight=p[4 * i], bias=p[4 * i + 1], bn=c.bn._replace(weight=p[4 * i + 2], bias=p[4 * i + 3]))
                for i, c in enumerate(convs)
            ]
            return self.fn(x, units, memory=memory)

        # fast_mode: one random direction an input instead of every element.
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)

    def test_repeats(self, backend):
        public_cases.check_repeats(self.fn, self.make("strided"))

    @pytest.mark.parametrize("memory", ["default", "low"])
    @pytest.mark.parametrize("configuration", ["strided", "biased"])
    def test_subsets_of_gradients(self, backend, configuration, memory):
        def fn(**args):
            return self.fn(**args, memory=memory)

        # Every single tensor alone costs a forward and a backward: on simulated hardware only the outermost.
        public_cases.check_subsets(fn, self.make(configuration), singles=backend in ("reference", "cpu"))

    def test_frozen_and_learning_norms(self, backend):
        """Statistics of the batch in one BN, given ones in the others."""
        args = self.make("projection", training=False)
        first = args["convs"][0]
        args["convs"] = (first._replace(bn=first.bn._replace(training=True)), *args["convs"][1:])
        _keep_clear(args)
        public_cases.compare(self.fn, self.reference, args, terms=terms(args))

    def test_momentum_none_and_no_statistics(self, backend):
        args = self.make("projection", momentum=None)
        last = args["convs"][-1]
        bare = last.bn._replace(running_mean=None, running_var=None, num_batches_tracked=None)
        args["convs"] = (*args["convs"][:-1], last._replace(bn=bare))
        public_cases.compare(self.fn, self.reference, args, terms=terms(args))

    def test_incoming_gradients(self, backend):
        public_cases.check_incoming_gradients(self.fn, self.make("identity"))

    def test_double_backward(self, backend):
        public_cases.check_double_backward(self.fn, self.make("identity"))

    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_checkpoint(self, backend, memory):
        public_cases.check_checkpoint(lambda x, **a: self.fn(x, **a, memory=memory), self.make("projection"))

    @pytest.mark.computes_in(torch.bfloat16)
    def test_autocast(self, backend):
        args = self.make("strided", size=(12, 11))  # with a projection everything up to the last addition is bf16
        public_cases.check_autocast(self.fn, self.reference, args, terms=terms(args))

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("configuration", ["identity", "strided"])
    def test_compile(self, configuration, training):
        public_cases.check_compile(self.fn, self.make(configuration, training=training), "aot_eager")

    def test_compile_low_memory(self):
        public_cases.check_compile(lambda **a: self.fn(**a, memory="low"), self.make("strided"), "aot_eager")

    def test_opcheck(self):
        for configuration, low in (("identity", False), ("strided", True), ("biased", False)):
            args = self.make(configuration, requires_grad=False)
            units = [*args["convs"], *([args["shortcut"]] if args["shortcut"] is not None else [])]
            kind = engine.IDENTITY if args["shortcut"] is None else engine.PROJECTION
            public_cases.opcheck_block(args["x"].detach(), None, units, kind, self.op, low)
