"""What records a call records the operator: other inputs give other outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn_core.mask import Mask
from adaattn_torch import AdaptiveAttention, attend, compat, enable, listening
from adaattn_torch import scaled_dot_product_attention as sdpa

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.(trace|save|load).*:DeprecationWarning"),
    # Sizes are compared while tracing; what is recorded holds for the sizes traced.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def qkv(seed, length=6):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 1, 2, length, 8, generator=generator))


def under_mode(q, k, v):
    with enable(budget=1e-4):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def bshd(function):
    return lambda q, k, v: function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


multihead = AdaptiveAttention(16, 2, batch_first=True).eval().requires_grad_(False)
plain = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)


def module(q, k, v):
    x = q.transpose(1, 2).flatten(2)
    return multihead(x, x, x, need_weights=False)[0]


def module_under_mode(q, k, v):
    x = q.transpose(1, 2).flatten(2)
    with enable():
        return plain(x, x, x, need_weights=False)[0]


WAYS = {
    "function": lambda q, k, v: sdpa(q, k, v),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "budget": lambda q, k, v: sdpa(q, k, v, budget=0.1),
    "boolean mask": lambda q, k, v: sdpa(q, k, v, q[..., :1] < 0.5),
    "additive mask": lambda q, k, v: sdpa(q, k, v, q[..., :1] + v[..., 0].unsqueeze(-2)),
    "three dimensions": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "mode": under_mode,
    "flash_attn_func": bshd(compat.flash_attn_func),
    "sageattn": lambda q, k, v: compat.sageattn(q, k, v, is_causal=True),
    "attend": lambda q, k, v: attend(q, k, v, mask=Mask.causal("top_left"), scale=0.3).out,
    "module": module,
    "module under a mode": module_under_mode,
}


@pytest.mark.parametrize("way", WAYS)
def test_jit_trace(way):
    with torch.no_grad():
        traced = torch.jit.trace(WAYS[way], qkv(0))
        assert "adaattn::attention" in str(traced.inlined_graph)
        for seed, length in ((1, 6), (2, 9)):
            given = qkv(seed, length)
            torch.testing.assert_close(traced(*given), WAYS[way](*given))


def test_traces_have_gradients_and_are_heard():
    traced = torch.jit.trace(lambda q, k, v: sdpa(q, k, v, is_causal=True), qkv(0))
    given = [x.requires_grad_() for x in qkv(1)]
    with listening([]) as infos:
        ours = torch.autograd.grad(traced(*given).square().sum(), given)
    assert len(infos) == 1
    out = F.scaled_dot_product_attention(*given, is_causal=True)
    for a, b in zip(ours, torch.autograd.grad(out.square().sum(), given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("way", ["function", "mode", "sageattn", "additive mask"])
def test_make_fx(way, mode):
    with torch.no_grad():
        graph = make_fx(WAYS[way], tracing_mode=mode)(*qkv(0))
        given = qkv(1)
        torch.testing.assert_close(graph(*given), WAYS[way](*given))
    assert "adaattn.attention" in graph.code


class Holder(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, q, k, v):
        return WAYS[self.way](q, k, v)


@pytest.mark.parametrize("way", ["function", "sageattn", "three dimensions"])
def test_export(way):
    with torch.no_grad():
        program = torch.export.export(Holder(way), qkv(0), strict=False)
        given = qkv(1)
        torch.testing.assert_close(program.module()(*given), WAYS[way](*given))
    assert "adaattn.attention" in program.graph_module.code


def test_fx_records_the_function_with_its_budget():
    class Model(nn.Module):
        def forward(self, q, k, v):
            return sdpa(q, k, v, budget=0.1, layer="x")

    graph = torch.fx.symbolic_trace(Model())
    with listening([]) as infos:
        graph(*qkv(1))
    assert [info.plan.policy for info in infos] == ["budget"]
    assert infos[0].layer == "x"


def test_arguments_that_are_not_tensors_are_refused_as_pytorch_does():
    q, k, v = qkv(0)
    for given in ((q.numpy(), k, v), (q, k.tolist(), v), (q, k, None)):
        with pytest.raises(TypeError) as theirs:
            F.scaled_dot_product_attention(*given)
        with pytest.raises(TypeError) as ours:
            sdpa(*given)
        assert str(ours.value) == str(theirs.value)
        with pytest.raises(TypeError), enable():
            F.scaled_dot_product_attention(*given)


def test_a_compiler_sees_a_mode_and_tells_a_strict_one():
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for seed in range(3):  # compiled once, then run
        with enable(strict=True), listening([]) as infos:
            out = function(*qkv(seed))
        assert len(infos) == 1
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv(seed)))
    torch._dynamo.reset()


def test_saved_traces_mean_the_same(tmp_path):
    traced = torch.jit.trace(WAYS["budget"], qkv(0))
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    again = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(again(*qkv(1)), WAYS["budget"](*qkv(1)))
