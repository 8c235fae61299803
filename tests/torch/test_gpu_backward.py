"""Training on a CUDA device: the fused backward pass, from every door that leads to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.structure import Dense
from adaattn_cuda.backend import CudaBackend
from adaattn_torch import attend
from adaattn_torch import scaled_dot_product_attention as sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]


@pytest.fixture
def calls(monkeypatch):
    """Count fused backward passes, and note whether each was given an output."""
    seen = []
    plain = CudaBackend.backward

    def backward(self, *arrays, **given):
        found = plain(self, *arrays, **given)
        seen.append(given["out"] is not None)
        return found

    monkeypatch.setattr(CudaBackend, "backward", backward)
    return seen


def inputs(dtype=torch.bfloat16, heads_kv=2, len_q=200, len_kv=200):
    torch.manual_seed(0)
    shapes = ((2, len_q, 4, 64), (2, len_kv, heads_kv, 64), (2, len_kv, heads_kv, 64))
    made = [torch.randn(s, device="cuda").to(dtype).transpose(1, 2) for s in shapes]
    return [x.requires_grad_() for x in made]


def held(ours, given, weight, mask=None, **options):
    """At most twice the error of PyTorch's own backward pass."""
    theirs = torch.autograd.grad(
        F.scaled_dot_product_attention(*given, mask, enable_gqa=True, **options), given, weight
    )
    wide = [x.detach().double().requires_grad_() for x in given]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*wide, mask, enable_gqa=True, **options)
    truth = torch.autograd.grad(out, wide, weight.double())
    for a, b, c in zip(ours, theirs, truth, strict=True):
        error, known = (float((x.double() - c).norm() / c.norm()) for x in (a, b))
        assert error <= 2 * known + 4e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_plain(calls, dtype, causal):
    given = inputs(dtype)
    weight = torch.randn(2, 4, 200, 64, device="cuda").to(dtype)
    out = sdpa(*given, is_causal=causal, enable_gqa=True)
    held(torch.autograd.grad(out, given, weight), given, weight, is_causal=causal)
    assert calls == [True]


def test_an_approximated_forward_has_the_exact_gradient(calls):
    """Its output and lse are not exact attention's: both are computed again."""
    given = inputs(torch.float32)
    weight = torch.randn(2, 4, 200, 64, device="cuda")
    coarse = sdpa(*given, enable_gqa=True, policy=FixedPolicy(Dense(), "bf16", "bf16"))
    exact = F.scaled_dot_product_attention(*given, enable_gqa=True)
    assert (coarse - exact).abs().max() > 1e-3  # it is an approximation
    held(torch.autograd.grad(coarse, given, weight), given, weight)
    assert calls == [False]


def test_checkpointed(calls):
    given = inputs()
    weight = torch.randn(2, 4, 200, 64, device="cuda").bfloat16()
    out = checkpoint(lambda *x: sdpa(*x, enable_gqa=True), *given, use_reentrant=False)
    again = torch.autograd.grad(out, given, weight)
    held(again, given, weight)
    assert calls == [True]


def test_under_autocast(calls):
    given = inputs(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = sdpa(*given, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, given, torch.randn_like(out))
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in found)
    assert calls == [True]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled(calls):
    given = inputs()
    weight = torch.randn(2, 4, 200, 64, device="cuda").bfloat16()
    call = torch.compile(lambda *x: sdpa(*x, is_causal=True, enable_gqa=True), fullgraph=True)
    held(torch.autograd.grad(call(*given), given, weight), given, weight, is_causal=True)
    assert calls == [True]


def test_deterministic_algorithms(calls):
    given = inputs(len_q=700, len_kv=900)
    weight = torch.randn(2, 4, 700, 64, device="cuda").bfloat16()
    out = sdpa(*given, enable_gqa=True)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (
            torch.autograd.grad(out, given, weight, retain_graph=True) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(calls) == 2


def test_gradient_of_a_sum_and_of_the_lse(calls):
    given = inputs(torch.float32, heads_kv=4)
    out, lse, _ = attend(*given, scale=0.125)
    found = torch.autograd.grad(out.sum() + 3 * lse.sum(), given)
    wide = [x.detach().double().requires_grad_() for x in given]
    scores = wide[0] @ wide[1].mT * 0.125
    total = (scores.softmax(-1) @ wide[2]).sum() + 3 * scores.logsumexp(-1).sum()
    for a, b in zip(found, torch.autograd.grad(total, wide), strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= 1e-5
    assert calls == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sinks(calls, dtype):
    given = inputs(dtype)
    sinks = torch.tensor([0.5, -3.0, 6.0, 1.0], device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 4, 200, 64, device="cuda").to(dtype)
    out = sdpa(*given, is_causal=True, enable_gqa=True, sinks=sinks)
    found = torch.autograd.grad(out, [*given, sinks], weight)
    wide = [x.detach().double().requires_grad_() for x in (*given, sinks)]
    k, v = (x.repeat_interleave(2, 1) for x in wide[1:3])
    scores = wide[0] @ k.mT * 64**-0.5
    scores = scores.masked_fill(~torch.ones(200, 200, device="cuda").tril().bool(), -torch.inf)
    column = wide[3][None, :, None, None].expand(2, 4, 200, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)
    exact = weights[..., :200] @ v
    truth = torch.autograd.grad(exact, wide, weight.double(), retain_graph=True)
    # A sink's gradient is a sum over rows that cancel; each errs as its rounded output does.
    of_rows = (weights[..., 200] * (exact * weight.double()).sum(-1)).detach()
    unit = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}[dtype]
    for a, b, size in zip(found, truth, (*truth[:3], of_rows), strict=True):
        assert float((a.double() - b).norm() / size.norm()) <= unit
    assert calls == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_softcap(calls, dtype):
    given = inputs(dtype, heads_kv=4)
    weight = torch.randn(2, 4, 200, 64, device="cuda").to(dtype)
    found = torch.autograd.grad(sdpa(*given, softcap=1.5), given, weight)
    wide = [x.detach().double().requires_grad_() for x in given]
    scores = 1.5 * torch.tanh(wide[0] @ wide[1].mT * 64**-0.5 / 1.5)
    truth = torch.autograd.grad(scores.softmax(-1) @ wide[2], wide, weight.double())
    unit = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}[dtype]
    for a, b in zip(found, truth, strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= unit
    assert calls == [True]


def test_masks_with_a_gradient(calls):
    given = inputs(torch.float32, heads_kv=4)
    bias = torch.randn(1, 4, 1, 200, device="cuda", requires_grad=True)
    weight = torch.randn(2, 4, 200, 64, device="cuda")
    ours = torch.autograd.grad(sdpa(*given, bias), [*given, bias], weight)
    wide = [x.detach().double().requires_grad_() for x in (*given, bias)]
    out = F.scaled_dot_product_attention(*wide[:3], wide[3].expand(2, 4, 200, 200))
    for a, b in zip(ours, torch.autograd.grad(out, wide, weight.double()), strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= 1e-5
    assert calls == [True]


def test_second_derivatives_take_the_chunks(calls):
    given = inputs(torch.float32, heads_kv=4, len_q=20, len_kv=30)
    (first,) = torch.autograd.grad(sdpa(*given).square().sum(), given[:1], create_graph=True)
    assert calls == []
    found = torch.autograd.grad(first.square().sum(), given)
    # The chunks' gradient also leads back to the output, whose own first derivative is fused.
    assert calls == [True]
    wide = [x.detach().double().requires_grad_() for x in given]
    scores = wide[0] @ wide[1].mT * 64**-0.5
    (first,) = torch.autograd.grad(
        (scores.softmax(-1) @ wide[2]).square().sum(), wide[:1], create_graph=True
    )
    for a, b in zip(found, torch.autograd.grad(first.square().sum(), wide), strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= 1e-4
