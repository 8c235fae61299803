"""Softcap and sinks through PyTorch: values, derivatives, fallbacks that are said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import adaattn_torch
from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch import compat
from adaattn_torch import info as infos
from adaattn_torch import scaled_dot_product_attention as sdpa
from adaattn_torch.bridge import attend
from adaattn_torch.ruled import plain_attention
from adaattn_torch.rules import Rule, Rules

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def tensors(length: int = 7, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query of four heads, key and value of two, sinks."""
    torch.manual_seed(0)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 6), (4,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


RULES = ["softcap", "sinks", "both"]


def rules(kind: str, sinks: torch.Tensor) -> dict[str, Any]:
    return {
        "softcap": None if kind == "sinks" else 1.5,
        "sinks": None if kind == "softcap" else sinks,
    }


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("masked", ["none", "causal", "boolean", "additive"])
def test_values_and_gradients(kind: str, masked: str) -> None:
    """Against autograd through the definition, in plain operations."""
    q, k, v, sinks = tensors()
    allowed = torch.rand(7, 7) > 0.3
    allowed[2] = False
    bias = torch.randn(1, 4, 1, 7, dtype=torch.float64, requires_grad=True)
    mask = {"boolean": allowed, "additive": bias}.get(masked)
    causal = masked == "causal"
    asked = rules(kind, sinks)
    wanted = [q, k, v, *([sinks] if asked["sinks"] is not None else [])]
    wanted += [bias] if masked == "additive" else []
    out = sdpa(q, k, v, mask, is_causal=causal, enable_gqa=True, strict=True, **asked)
    plain = plain_attention(q, k, v, mask, 0.0, causal, None, asked["softcap"], asked["sinks"])
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), wanted)
    theirs = torch.autograd.grad((plain * weight).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def attended(q: Any, k: Any, v: Any, sinks: Any, kind: str) -> Any:
    """Attention of which the first rows see nothing."""
    call: Any = {"scale": 0.7, "mask": Mask.causal("bottom_right"), "want_info": False}
    return attend(q, k[:, :, 3:], v[:, :, 3:], **call, **rules(kind, sinks))


@pytest.mark.parametrize("kind", RULES)
def test_first_second_and_forward_derivatives(kind: str) -> None:
    """In reverse, forward and reverse over reverse."""
    q, k, v, sinks = tensors(5)
    inputs = tuple(x[:1].detach().requires_grad_() for x in (q, k, v))

    def function(*x: Any) -> Any:
        return attended(*x, kind).out

    ways: Any = {"fast_mode": True, "atol": 1e-5}
    assert torch.autograd.gradcheck(function, (*inputs, sinks), check_forward_ad=True, **ways)
    assert torch.autograd.gradgradcheck(function, (*inputs, sinks), **ways)


@pytest.mark.parametrize("kind", RULES)
def test_the_lse_has_a_gradient(kind: str) -> None:
    """Of a row that sees nothing, the sink's alone."""
    q, k, v, sinks = tensors(5)
    asked = rules(kind, sinks)
    scores = 0.7 * q @ k[:, :, 3:].repeat_interleave(2, 1).mT
    if asked["softcap"] is not None:
        scores = 1.5 * torch.tanh(scores / 1.5)
    hidden = ~torch.ones(5, 2, dtype=torch.bool).tril(-3)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    if asked["sinks"] is not None:
        lse = torch.logaddexp(lse, sinks[None, :, None])
    weight = torch.where(lse.isinf(), 0, torch.randn_like(lse)).detach()
    wanted = [q, k, *([sinks] if asked["sinks"] is not None else [])]
    theirs = torch.autograd.grad((lse.nan_to_num(neginf=0) * weight).sum(), wanted)
    found = attended(q, k, v, sinks, kind).lse.nan_to_num(neginf=0)
    ours = torch.autograd.grad((found * weight).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_sinks_in_half_precision_get_a_gradient_of_theirs() -> None:
    q, k, v, sinks = (x.detach().to(torch.bfloat16).requires_grad_() for x in tensors())
    out = sdpa(q, k, v, is_causal=True, enable_gqa=True, strict=True, sinks=sinks)
    out.sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == torch.bfloat16
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    plain_attention(*wide[:3], None, 0.0, True, None, None, wide[3]).sum().backward()
    error = (sinks.grad.double() - wide[3].grad).norm()
    assert error <= 2.0**-6 * wide[3].grad.norm()


def test_what_no_backend_takes_is_plain_operations_and_said() -> None:
    q, k, v, sinks = (x.detach() for x in tensors())
    infos.forget_warnings()
    with pytest.warns(adaattn_torch.FallbackWarning, match="dropout"):
        out, info = sdpa(
            q, k, v, None, 1.0, enable_gqa=True, softcap=2.0, sinks=sinks, return_info=True
        )
    assert info.fell_back
    assert (out == 0).all()
    with pytest.raises(UnsupportedError):
        sdpa(q, k, v, None, 0.5, enable_gqa=True, softcap=2.0, strict=True)
    batched = torch.vmap(lambda x: sdpa(x, k, v, enable_gqa=True, softcap=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = batched(torch.stack([q, 2 * q]))
    torch.testing.assert_close(found[0], sdpa(q, k, v, enable_gqa=True, softcap=2.0))


def test_compiled_calls_are_written_out() -> None:
    q, k, v, sinks = (x.detach() for x in tensors())
    compiled = torch.compile(
        lambda *x: sdpa(*x[:3], is_causal=True, enable_gqa=True, softcap=2.0, sinks=x[3]),
        backend="eager",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compiled(q, k, v, sinks)
    eager = sdpa(q, k, v, is_causal=True, enable_gqa=True, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(found, eager)


def test_rules_that_split_heads_hand_each_its_own_sinks() -> None:
    q, k, v, sinks = (x.detach() for x in tensors())
    split = Rules((Rule(heads=(1, 2), budget=0.5), Rule()))
    asked: Any = {"enable_gqa": True, "softcap": 2.0, "sinks": sinks}
    whole = sdpa(q, k, v, **asked)
    apart = split.attention("", q, k, v, into=None, **asked)
    assert (apart - whole).norm() <= 0.5 * whole.norm()
    exact = Rules((Rule(heads=(1, 2)), Rule()))
    torch.testing.assert_close(exact.attention("", q, k, v, into=None, **asked), whole)


def test_sinks_of_another_shape_are_refused() -> None:
    q, k, v, _ = (x.detach() for x in tensors())
    with pytest.raises(ShapeError):
        sdpa(q, k, v, enable_gqa=True, sinks=torch.zeros(1, 4), strict=True)
    with pytest.raises(UnsupportedError, match="sinks of shape"):
        sdpa(q, k, v, enable_gqa=True, sinks=torch.zeros(3), strict=True)


def test_flash_attentions_signature_takes_a_softcap() -> None:
    """Packed or not, with its window; 0 is none."""
    q, k, v = (x.detach().transpose(1, 2) for x in tensors(9)[:3])
    lead = q.shape[0]
    asked: Any = {"causal": True, "window_size": (3, 0)}
    out = compat.flash_attn_func(q, k, v, softcap=1.5, **asked)
    near = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    three = [x.transpose(1, 2) for x in (q, k, v)]
    plain = plain_attention(*three, near, 0.0, False, None, 1.5, None)
    torch.testing.assert_close(out, plain.transpose(1, 2), rtol=1e-12, atol=1e-12)
    packed = [x.reshape(lead * 9, *x.shape[2:]) for x in (q, k, v)]
    edges = [9 * i for i in range(lead + 1)]
    ragged = compat.flash_attn_varlen_func(*packed, edges, edges, 9, 9, softcap=1.5, **asked)
    torch.testing.assert_close(ragged.reshape(out.shape), out)
    none = compat.flash_attn_func(q, k, v, softcap=0.0, **asked)
    torch.testing.assert_close(none, compat.flash_attn_func(q, k, v, **asked))
