"""Gradients are exact attention's, whatever the forward pass did."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import adaattn_torch.gradient as gradient_module
from adaattn_core import FixedPolicy
from adaattn_core.mask import Mask
from adaattn_torch import attend
from adaattn_torch import scaled_dot_product_attention as sdpa

MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {
        "attn_mask": torch.tensor([[1, 0, 1, 1, 0], [0] * 5, [1] * 5, [0, 0, 0, 0, 1]]).bool()
    },
    "additive": {"attn_mask": torch.randn(1, 4, 4, 5, dtype=torch.float64)},
}  # fmt: skip


def inputs(len_q=4, len_kv=5, heads_kv=4, dim_v=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, len_q, 6), (2, heads_kv, len_kv, 6), (2, heads_kv, len_kv, dim_v))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_at_the_lowest_finite_number(dtype):
    """Such a row weighs its values alike, and so do its gradients."""
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 6, 8, dtype=dtype).requires_grad_() for _ in range(3)]
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[2] = mask[4, 3:] = torch.finfo(dtype).min
    mask.requires_grad_()
    grad = torch.randn(1, 2, 6, 8, dtype=dtype)
    ours = torch.autograd.grad(sdpa(*given, mask), [*given, mask], grad)
    wide = [x.detach().double().requires_grad_() for x in (*given, mask)]
    out = F.scaled_dot_product_attention(*wide[:3], wide[3])
    theirs = torch.autograd.grad(out, wide, grad.double())
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 64 * torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_gradcheck(name, heads_kv):
    def function(*x):
        return sdpa(*x, **MASKS[name], enable_gqa=True)

    tensors = inputs(heads_kv=heads_kv)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_lse_has_a_gradient():
    # The lse is float32: differences of it are too coarse for gradcheck.
    tensors = inputs()
    lse = attend(*tensors, mask=Mask.causal("top_left"), scale=0.4).lse
    ours = torch.autograd.grad((lse * torch.arange(4)).sum(), tensors[:2])
    scores = tensors[0] @ tensors[1].mT * 0.4
    scores = scores.masked_fill(~torch.ones(4, 5).tril().bool(), -torch.inf)
    plain = (scores.logsumexp(-1) * torch.arange(4)).sum()
    for a, b in zip(ours, torch.autograd.grad(plain, tensors[:2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (2, 1, 4, 5), (2, 4, 1, 1)])
def test_additive_masks_have_a_gradient(shape):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = inputs()
    assert torch.autograd.gradcheck(lambda b: sdpa(*tensors, b), (bias,), fast_mode=True)


def test_ragged_batches():
    tensors = [x[:1] for x in inputs(9, 11)]
    mask = Mask.ragged((0, 4, 4, 9), (0, 3, 6, 11)) & Mask.sliding_window(2, 1, "bottom_right")
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, mask=mask, scale=0.3).out, tensors, fast_mode=True
    )


def test_key_lengths():
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, mask=Mask.key_lengths((0, 3)), scale=0.3).out,
        inputs(),
        fast_mode=True,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_change_nothing(monkeypatch, causal):
    tensors = inputs(37, 41, heads_kv=2)
    whole = torch.autograd.grad(
        sdpa(*tensors, is_causal=causal, enable_gqa=True).square().sum(), tensors
    )
    monkeypatch.setattr(gradient_module, "CHUNK_BYTES", 5 * 4 * 2 * 4 * 41)
    small = torch.autograd.grad(
        sdpa(*tensors, is_causal=causal, enable_gqa=True).square().sum(), tensors
    )
    for a, b in zip(whole, small, strict=True):
        torch.testing.assert_close(a, b)


def test_an_approximated_forward_has_the_exact_gradient():
    tensors = inputs(64, 64, dtype=torch.float32)
    weight = torch.randn(2, 4, 64, 3)
    coarse = sdpa(*tensors, policy=FixedPolicy(qk="i8", pv="e4m3"))
    exact = F.scaled_dot_product_attention(*tensors)
    assert (coarse - exact).abs().max() > 1e-3  # it is an approximation
    ours = torch.autograd.grad((coarse * weight).sum(), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(
        (F.scaled_dot_product_attention(*wide) * weight.double()).sum(), wide
    )
    theirs = torch.autograd.grad((exact * weight).sum(), tensors)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        floor = 4 * 2.0**-24 * c.abs().max()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_as_good_as_pytorchs(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(24, 24)]
    weight = torch.randn(2, 4, 24, 3).to(dtype)
    ours = torch.autograd.grad(sdpa(*tensors), tensors, weight)
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, weight)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, weight.double())
    roundoff = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == dtype
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 4 * roundoff * c.abs().max()


def test_nan_behind_a_mask_does_not_reach_the_gradient():
    query, key, value = inputs()
    with torch.no_grad():
        key[..., 2, :] = torch.nan
        value[..., 2, :] = torch.nan
        query[..., 1, :] = torch.nan
    allowed = torch.ones(4, 5, dtype=torch.bool)
    allowed[:, 2] = False
    allowed[1] = False
    out = sdpa(query, key, value, allowed)
    assert (out[..., 1, :] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (query, key, value)):
        assert torch.isfinite(gradient).all()


def test_only_what_is_asked_for_gets_a_gradient():
    query, key, value = inputs()
    value = value.detach()
    sdpa(query, key.detach(), value).sum().backward()
    assert query.grad is not None
    assert key.grad is None
    with torch.no_grad():
        assert not sdpa(query, key, value).requires_grad
