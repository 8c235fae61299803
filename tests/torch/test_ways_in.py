"""The other ways in: the mode, the module and the signatures of other libraries."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from adaattn_core import FixedPolicy
from adaattn_core.errors import ArgumentError, UnsupportedError
from adaattn_torch import AdaptiveAttention, FallbackWarning, Rule, compat, convert, enable

EPS = 2.0**-24


def close(ours, theirs, roundings=32):
    """Two float32 results of sums of a few dozen terms, each with its own rounding."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= roundings * EPS * max(1.0, float(theirs.abs().max()))


def qkv(heads=2, length=40):
    return torch.randn(3, 1, heads, length, 16)


# -- the mode ---------------------------------------------------------------------------------
def test_mode_takes_calls_and_gives_them_back():
    q, k, v = qkv()
    with enable(budget=0.1, policy=FixedPolicy(qk="e4m3", pv="e4m3")) as mode:
        out = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
    assert len(mode.infos) == 1
    assert (mode.infos[0].certificate.upper <= 0.1).all()
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = (out - exact).square().sum((-1, -2)) / exact.square().sum((-1, -2))
    assert (error > 1e-6).all()  # it was approximated, within the budget
    assert (error <= 0.1**2).all()
    assert len(mode.infos) == 1  # outside, PyTorch's own


def test_the_innermost_mode_decides_and_falls_back_past_the_outer():
    q, k, v = qkv()
    with enable() as outer, enable(budget=0.1) as inner:
        F.scaled_dot_product_attention(q, k, v)
        with pytest.warns(FallbackWarning):
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    assert [i.fell_back for i in inner.infos] == [None, "dropout"]
    assert outer.infos == []


def test_modes_belong_to_their_thread():
    q, k, v = qkv()
    other = []
    with enable() as mode:
        thread = threading.Thread(
            target=lambda: other.append(F.scaled_dot_product_attention(q, k, v))
        )
        thread.start()
        thread.join()
    assert mode.infos == []
    assert torch.equal(other[0], F.scaled_dot_product_attention(q, k, v))


class Layer(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_rules_by_layer_phase_and_head():
    model = nn.ModuleDict({"first": Layer(), "second": Layer()})
    x = torch.randn(1, 4, 30, 16)
    rules = [
        Rule("first", phase="decode", budget=0.5),
        Rule("second", heads=(1, 3), budget=0.3),
    ]
    with enable(rules=rules, model=model) as mode:
        model["first"](x)
        model["first"](x[..., :1, :])
        out = model["second"](x)
    assert [(i.layer, i.heads) for i in mode.infos] == [
        ("first", None), ("first", None), ("second", (1, 3)), ("second", (0, 2)),
    ]  # fmt: skip
    assert [i.plan.policy for i in mode.infos] == ["exact", "budget", "budget", "exact"]
    exact = F.scaled_dot_product_attention(x, x, x)
    close(out[:, [0, 2]], exact[:, [0, 2]])
    error = (out - exact)[0, 1].norm(dim=-1)
    assert (error <= 0.3 * exact[0, 1].norm(dim=-1).square().mean().sqrt()).float().mean() > 0.9
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rules_by_head_with_grouped_heads_and_masks():
    q, (k, v) = torch.randn(1, 4, 9, 16), torch.randn(2, 1, 2, 9, 16)
    mask = torch.randn(1, 4, 9, 9)
    with enable(rules=[Rule(heads=(3, 0), budget=1e-4)]) as mode:
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert [i.heads for i in mode.infos] == [(0, 3), (1, 2)]
    close(out, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), 2000)


def test_unknown_phase():
    with pytest.raises(ArgumentError):
        Rule(phase="train")


# -- the module -------------------------------------------------------------------------------
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2, [False] * 7])},
    "boolean": {"attn_mask": torch.ones(7, 7).triu(1).bool()},
    "per head": {"attn_mask": torch.randn(2 * 4, 7, 7)},
    "causal": {"attn_mask": torch.ones(7, 7).triu(1).bool(), "is_causal": True},
    "both": {
        "key_padding_mask": torch.tensor([[0.0] * 5 + [-torch.inf] * 2, [0.0] * 7]),
        "attn_mask": torch.randn(7, 7),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_module_equals_multihead_attention(mask, batch_first):
    theirs = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    ours = convert(theirs)
    assert type(ours) is AdaptiveAttention
    x = torch.randn(2, 7, 32)
    x = x if batch_first else x.transpose(0, 1)
    out, weights = ours(x, x, x, need_weights=False, **MASKS[mask])
    assert weights is None
    assert ours.last_info.fell_back is None
    close(out, theirs(x, x, x, need_weights=False, **MASKS[mask])[0])


def test_module_with_other_key_sizes_and_without_batch():
    theirs = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, bias=False)
    ours = AdaptiveAttention.from_multihead(theirs)
    given = torch.randn(5, 32), torch.randn(6, 20), torch.randn(6, 24)
    close(ours(*given, need_weights=False)[0], theirs(*given, need_weights=False)[0])
    assert ours.last_info.fell_back is None


def test_module_shares_parameters_and_trains():
    theirs = nn.MultiheadAttention(32, 4)
    ours = convert(theirs, budget=0.1)
    assert {k: v.data_ptr() for k, v in ours.state_dict().items()} == {
        k: v.data_ptr() for k, v in theirs.state_dict().items()
    }
    x = torch.randn(7, 2, 32)
    ours(x, x, x, need_weights=False)[0].sum().backward()
    assert theirs.in_proj_weight.grad is not None


def test_module_falls_back_visibly():
    ours = AdaptiveAttention(32, 4, dropout=0.5)
    x = torch.randn(7, 2, 32)
    with pytest.warns(FallbackWarning, match="need_weights"):
        _, weights = ours.eval()(x, x, x)
    assert weights.shape == (2, 7, 7)
    assert "need_weights" in ours.last_info.fell_back
    with pytest.warns(FallbackWarning, match="dropout"):
        ours.train()(x, x, x, need_weights=False)
    ours.strict = True
    with pytest.raises(UnsupportedError):
        ours(x, x, x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # PyTorch's own
def test_converted_encoder_uses_the_module_in_evaluation_too():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 7, 32), torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        convert(model, budget=1e-3)
        out = model(x, src_key_padding_mask=padding)
    infos = [m.last_info for m in model.modules() if isinstance(m, AdaptiveAttention)]
    assert [i.layer for i in infos] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(i.fell_back is None for i in infos)
    seen = ~padding
    # Budget 1e-3 in each of two layers, magnified at most a few times by what follows.
    assert (out - expected)[seen].norm() <= 1e-2 * expected[seen].norm()


# -- other libraries' signatures --------------------------------------------------------------
def bottom_right(len_q, len_kv, window=(-1, 0)):
    row = torch.arange(len_q)[:, None] + len_kv - len_q
    column = torch.arange(len_kv)
    allowed = torch.ones(len_q, len_kv, dtype=torch.bool)
    if window[0] >= 0:
        allowed &= column >= row - window[0]
    if window[1] >= 0:
        allowed &= column <= row + window[1]
    return allowed


@pytest.mark.parametrize(
    ("causal", "window"), [(True, (-1, -1)), (False, (2, 1)), (True, (3, 5))]
)
def test_flash_attn_func(causal, window):
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    out = compat.flash_attn_func(q, k, v, causal=causal, window_size=window)
    allowed = bottom_right(5, 9, (window[0], 0 if causal else window[1]))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("size", [sys.maxsize, 2**64, 10**30])
def test_a_window_beyond_every_integer_holds_every_key(size):
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    for window in ((size, size), (size, -1), (-1, size)):
        out = compat.flash_attn_func(q, q, q, window_size=window)
        whole = compat.flash_attn_func(q, q, q)
        assert torch.equal(out, whole)
        grads = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, whole))
        assert torch.equal(*grads)


def test_flash_attn_varlen_func():
    q, k, v = torch.randn(9, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    cu_q = torch.tensor([0, 4, 9], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 11], dtype=torch.int32)
    out = compat.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 6, causal=True)
    for i in range(2):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = compat.flash_attn_func(q[None, rows], k[None, keys], v[None, keys], causal=True)
        close(out[rows], alone[0])
    with pytest.raises(ArgumentError, match="max_seqlen_k=6"):
        compat.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 5)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_sageattn(layout):
    q, k, v = qkv()
    given = [x if layout == "HND" else x.transpose(1, 2) for x in (q, k, v)]
    out, lse = compat.sageattn(*given, layout, is_causal=True, return_lse=True)
    out = out if layout == "HND" else out.transpose(1, 2)
    close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    scores = (q @ k.mT / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    close(lse, scores.logsumexp(-1))
    with pytest.raises(ArgumentError):
        compat.sageattn(q, k, v, "BHSD")


@pytest.mark.parametrize(
    "argument",
    [{"dropout_p": 0.1}, {"return_attn_probs": True},
     {"alibi_slopes": torch.ones(4)}],
)  # fmt: skip
def test_what_cannot_be_honoured_is_an_error(argument):
    q = torch.randn(1, 5, 4, 16)
    with pytest.raises(UnsupportedError, match=next(iter(argument))):
        compat.flash_attn_func(q, q, q, **argument)
