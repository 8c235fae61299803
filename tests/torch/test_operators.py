"""The operators are sound by torch's own checks, and compile without breaks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812

from adaattn_core import ErrorBudget, FixedPolicy
from adaattn_core.errors import ArgumentError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch import FallbackWarning, listening
from adaattn_torch import scaled_dot_product_attention as sdpa
from adaattn_torch.call import Asked, decode, encode


def tensors(length=12, requires_grad=True):
    shapes = ((1, length, 4, 8), (1, length + 2, 2, 8), (1, length + 2, 2, 6))
    return [torch.randn(s).transpose(1, 2).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_opcheck(mask):
    allowed = torch.rand(1, 1, 12, 14) < 0.8 if mask == "boolean" else None
    bias = torch.randn(1, 4, 12, 14, requires_grad=True) if mask == "additive" else None
    call = encode(Mask.causal("top_left"), Asked(seed=1))
    torch.library.opcheck(
        torch.ops.adaattn.attention.default, (*tensors(), allowed, bias, 0.3, *call)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rule(dtype):
    given, call = tensors(), encode(Mask.none(), Asked())
    bias = torch.randn(12, 14)[None, None]
    with torch.autocast("cpu", dtype):
        out, lse = torch.ops.adaattn.attention(*given, None, bias, 0.3, *call)
        eager = sdpa(*given, bias, scale=0.3, enable_gqa=True)
        torch._dynamo.reset()
        function, _ = compiled(lambda *x: sdpa(*x, scale=0.3, enable_gqa=True))
        assert torch.equal(function(*given, bias), eager)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, eager)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), given),
        torch.autograd.grad(eager.sum(), given),
        strict=True,
    ):
        assert ours.dtype == torch.float32  # the cast has a gradient
        assert torch.equal(ours, theirs)


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, dynamic=True), counter


@pytest.mark.parametrize("budget", [None, 0.1, ErrorBudget(rel=0.2, rows=0.9)])
def test_compiles_whole_and_once_for_all_lengths(budget):
    function, counter = compiled(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True, budget=budget, seed=5)
    )
    for length in (16, 24, 40, 41):
        given = tensors(length)
        out = function(*given)
        eager = sdpa(*given, is_causal=True, enable_gqa=True, budget=budget, seed=5)
        assert torch.equal(out, eager)
        assert out.stride() == eager.stride()
        ours = torch.autograd.grad(out.sum(), given)
        for a, b in zip(ours, torch.autograd.grad(eager.sum(), given), strict=True):
            torch.testing.assert_close(a, b)
    # Text that is constant while tracing comes out as a graph without operations.
    working = [
        graph
        for graph in counter.graphs
        if any(node.op.startswith("call_") for node in graph.graph.nodes)
    ]
    assert len(working) == 1


def test_compiled_calls_are_heard_of():
    function, _ = compiled(lambda q, k, v: sdpa(q, k, v, enable_gqa=True, budget=0.1))
    with listening([]) as infos, torch.no_grad():
        function(*tensors())
    assert len(infos) == 1
    assert (infos[0].certificate.upper <= 0.1).all()


def test_compiled_masks():
    function, _ = compiled(lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True))
    given = tensors()
    for mask in (torch.rand(12, 14) < 0.8, torch.randn(12, 14)):
        assert torch.equal(function(*given, mask), sdpa(*given, mask, enable_gqa=True))


def test_compiled_fallback_is_seen():
    function, _ = compiled(lambda q, k, v: sdpa(q, k, v, enable_gqa=True, dropout_p=0.5))
    with pytest.warns(FallbackWarning, match="dropout"):
        assert function(*tensors()).shape == (1, 4, 12, 6)


# Inductor's own imports use a deprecated decorator.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_inductor_compiles_it():
    function, _ = compiled(lambda q, k, v: sdpa(q * 2, k, v, enable_gqa=True) + 1, "inductor")
    given = tensors(requires_grad=False)
    wide = [x.double() for x in given]
    exact = F.scaled_dot_product_attention(wide[0] * 2, *wide[1:], enable_gqa=True) + 1
    assert (function(*given) - exact).abs().max() <= 16 * 2.0**-24 * exact.abs().max()


def test_second_derivatives_are_refused_where_there_are_none():
    call = encode(Mask.none(), Asked())
    given = tensors()
    out, _ = torch.ops.adaattn.attention(*given, None, None, 0.3, *call)
    (first,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.sum().backward()


def test_calls_survive_being_text():
    policy = FixedPolicy(qk="bf16", pv="bf16")
    mask = Mask.key_lengths((3, 4)) & Mask.causal("bottom_right")
    asked = Asked(
        budget=ErrorBudget(rel=0.3, guarantee="worst_case"),
        policy=policy, backend="numpy", layer="a.b", seed=7,
    )  # fmt: skip
    pattern, back = decode(*encode(mask, asked))
    assert back.policy is policy
    assert back.budget == asked.budget
    assert (back.backend, back.layer, back.seed) == ("numpy", "a.b", 7)
    for name in ("alignment", "left", "right", "lengths", "cu_seqlens_q", "cu_seqlens_kv"):
        assert getattr(pattern, name) == getattr(mask, name)


def test_objects_of_another_process_are_refused():
    text = encode(Mask.none(), Asked())[0].replace(
        '"policy": null', '"policy": {"handle": "0"}'
    )
    with pytest.raises(ArgumentError, match="another process"):
        decode(text)
