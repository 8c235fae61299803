"""scaled_dot_product_attention means what PyTorch's function means."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from adaattn_core import FixedPolicy
from adaattn_core.errors import ArgumentError, BackendUnavailableError, UnsupportedError
from adaattn_torch import FallbackWarning, listening
from adaattn_torch import scaled_dot_product_attention as sdpa

_spec = importlib.util.spec_from_file_location("held", Path(__file__).with_name("conftest.py"))
held = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(held)
assert_as_good, oracle = held.assert_as_good, held.oracle

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw_tensor(data, shape, dtype, generator):
    """A tensor whose strides are a drawn permutation of the contiguous ones, or broken."""
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.sampled_from([1, 1, 2]))
    spread = [shape[axis] for axis in order]
    spread[-1] *= step
    base = torch.randn(spread, generator=generator).to(dtype)[..., ::step]
    return base.permute([order.index(axis) for axis in range(len(shape))])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_as_exact_as_pytorch(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from(DTYPES))
    lead = data.draw(st.sampled_from([(), (3,), (2, 3), (2, 1, 2), (1, 2, 2, 2)]))
    len_q, len_kv = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
    dim, dim_v = data.draw(st.sampled_from([1, 5, 16])), data.draw(st.sampled_from([1, 3, 16]))
    query = draw_tensor(data, (*lead, len_q, dim), dtype, generator)
    key = draw_tensor(data, (*lead, len_kv, dim), dtype, generator)
    value = draw_tensor(data, (*lead, len_kv, dim_v), dtype, generator)
    scale = data.draw(st.sampled_from([None, None, 0.3, -0.7, 2]))
    kind = data.draw(st.sampled_from(["none", "causal", "bool", "float"]))
    options = {"scale": scale, "is_causal": kind == "causal"}
    mask = None
    if kind in ("bool", "float"):
        shape = [
            data.draw(st.sampled_from([1, n])) if n > 1 else n for n in (*lead, len_q, len_kv)
        ]
        shape = shape[data.draw(st.integers(0, len(lead))) :]
        mask = torch.rand(shape, generator=generator) < 0.7
        if kind == "float":
            noise = torch.randn(shape, generator=generator)
            mask = noise.masked_fill(~mask, -torch.inf).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ours, info = sdpa(query, key, value, mask, **options, return_info=True)
    assert info.fell_back is None
    theirs = F.scaled_dot_product_attention(query, key, value, mask, **options)
    assert_as_good(ours, theirs, oracle(query, key, value, mask, **options), value)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 1)]),
    st.booleans(),
    st.integers(1, 30),
)
def test_grouped_heads(dtype, heads, causal, length):
    query = torch.randn(2, heads[0], length, 8).to(dtype)
    key, value = torch.randn(2, 2, heads[1], length + 3, 8).to(dtype)
    options = {"is_causal": causal, "enable_gqa": True}
    ours = sdpa(query, key, value, **options)
    theirs = F.scaled_dot_product_attention(query, key, value, **options)
    assert_as_good(ours, theirs, oracle(query, key, value, **options), value)


def test_grouped_heads_only_if_asked():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(query, key, key)
    with pytest.raises(RuntimeError) as ours:
        sdpa(query, key, key)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias(make, lengths):
    query, key = torch.randn(1, 2, lengths[0], 8), torch.randn(1, 2, lengths[1], 8)
    bias = make(*lengths)
    ours, info = sdpa(query, key, key, bias, return_info=True)
    assert info.fell_back is None
    theirs = F.scaled_dot_product_attention(query, key, key, bias)
    assert_as_good(ours, theirs, oracle(query, key, key, bias._materialize()), key)


def test_causal_is_upper_left():
    query, key = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 9, 8)
    value = torch.randn(1, 1, 9, 8)
    out = sdpa(query, key, value, is_causal=True)
    torch.testing.assert_close(out[0, 0, 0], value[0, 0, 0], rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_give_zero_even_beside_nan(dtype):
    query, key, value = torch.randn(3, 1, 1, 6, 8).to(dtype)
    key[..., 4, :] = torch.nan
    value[..., 4, :] = torch.nan
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[2] = False
    allowed[:, 4] = False
    out = sdpa(query, key, value, allowed)
    assert (out[0, 0, 2] == 0).all()
    assert torch.isfinite(out).all()
    added = torch.zeros(6, 6, dtype=dtype).masked_fill(~allowed, -torch.inf)
    assert torch.equal(sdpa(query, key, value, added), out)


def test_no_keys_give_zero():
    out = sdpa(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8))
    assert torch.equal(out, torch.zeros(1, 2, 3, 8))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 2, 0)])
def test_output_has_the_order_of_the_querys_strides(order):
    query = torch.randn(2, 3, 5, 8).permute(order).contiguous()
    query = query.permute([order.index(axis) for axis in range(4)])
    out = sdpa(query, query, query)
    assert out.stride() == query.stride()


def test_leading_dimensions_broadcast():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(1, 3, 6, 8)
    value = torch.randn(2, 1, 6, 8)
    ours, info = sdpa(query, key, value, return_info=True)
    assert info.fell_back is None
    theirs = F.scaled_dot_product_attention(query, key, value)
    assert_as_good(ours, theirs, oracle(query, key, value), value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.ones(4, 5, dtype=torch.bool)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.int32)},
        {"key": torch.randn(1, 2, 5, 7)},
        {"key": torch.randn(1, 2, 5, 8).double()},
    ],
)
def test_what_pytorch_refuses_is_refused_by_pytorch(arguments):
    given = dict(zip(("query", "key", "value"), torch.randn(3, 1, 2, 5, 8), strict=True))
    given |= arguments
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        F.scaled_dot_product_attention(**given)
    with pytest.raises(type(theirs.value)) as ours:
        sdpa(**given)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True},
        {"value": torch.randn(1, 2, 6, 8)},
    ],
)
def test_what_some_kernels_of_pytorch_compute_wrongly_is_refused(arguments):
    given = dict(zip(("query", "key", "value"), torch.randn(3, 1, 2, 5, 8), strict=True))
    with pytest.raises(ValueError, match="needed:"):
        sdpa(**(given | arguments))


def test_dropout_goes_to_pytorch_visibly_and_once():
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    torch.manual_seed(1)
    theirs = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(1)
    with pytest.warns(FallbackWarning, match="dropout"):
        ours, info = sdpa(query, key, value, dropout_p=0.5, budget=0.1, return_info=True)
    assert torch.equal(ours, theirs)
    assert info.fell_back == "dropout"
    assert info.certificate is None
    assert info.provenance["backend"] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sdpa(query, key, value, dropout_p=0.5)
    with pytest.raises(UnsupportedError, match="dropout"):
        sdpa(query, key, value, dropout_p=0.5, strict=True)


@pytest.mark.parametrize("scale", [0.0])
def test_scale_of_zero(scale):
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    with pytest.warns(FallbackWarning, match="scale"):
        ours = sdpa(query, key, value, scale=scale)
    assert torch.equal(ours, F.scaled_dot_product_attention(query, key, value, scale=scale))


@pytest.mark.parametrize(
    "policy", [None, FixedPolicy(qk="e4m3", pv="e4m3")], ids=["default", "fixed"]
)
def test_budget_and_certificate(policy):
    torch.manual_seed(0)  # one certificate in twenty may be wrong: not this one
    query, key, value = torch.randn(3, 1, 2, 300, 16)
    out, info = sdpa(
        query, key, value, is_causal=True, budget=0.1, policy=policy, layer="x", seed=0,
        return_info=True,
    )  # fmt: skip
    exact = torch.from_numpy(oracle(query, key, value, is_causal=True)[0].astype(float))
    error = (out.double() - exact).norm(dim=-1)
    rms = exact.square().sum(-1).mean(-1).sqrt()
    assert info.certificate.upper.shape == (1, 2)
    for head in range(2):
        upper = info.certificate[0, head].upper
        assert upper <= 0.1
        assert (error[0, head] <= upper * rms[0, head]).double().mean() >= 0.95
        assert policy is None or error[0, head].max() > 1e-3 * rms[0, head]
    assert info.plan.layer == info.layer == "x"


def test_a_plan_is_run_as_it_is():
    query, key, value = torch.randn(3, 1, 2, 64, 16)
    first, info = sdpa(query, key, value, budget=0.2, return_info=True)
    again, replay = sdpa(query, key, value, plan=info.plan, return_info=True)
    assert torch.equal(first, again)
    assert replay.plan == info.plan


def test_arguments_reach_the_core():
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    with pytest.raises(BackendUnavailableError):
        sdpa(query, key, value, backend="nonesuch")
    with pytest.raises(ArgumentError):
        sdpa(query, key, value, policy="nonesuch")
    with pytest.raises(ArgumentError):
        sdpa(query, key, value, seed=-1)


def test_autocast_casts_as_it_does_for_pytorch():
    query, key, value = torch.randn(3, 1, 2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.scaled_dot_product_attention(query, key, value)
        ours = sdpa(query, key, value)
    rounded = [x.bfloat16() for x in (query, key, value)]
    assert_as_good(ours, theirs, oracle(*rounded), value)


# PyTorch has no batching rule for its own CPU kernel, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_to_pytorch_visibly():
    query = torch.randn(3, 2, 4, 5, 8)
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        ours = torch.vmap(lambda x: sdpa(x, x, x))(query)
    theirs = F.scaled_dot_product_attention(query, query, query)
    assert_as_good(ours, theirs, oracle(query, query, query), query)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_to_pytorch_visibly():
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with pytest.warns(FallbackWarning, match="nested"):
        ours = sdpa(nested, nested, nested)
    for part, out in zip(parts, ours.transpose(1, 2).unbind(), strict=True):
        x = part.transpose(0, 1)
        theirs = F.scaled_dot_product_attention(x, x, x)
        assert_as_good(out.transpose(0, 1), theirs, oracle(x, x, x), x)


def test_meta_tensors_give_shape_and_strides():
    query = torch.randn(2, 5, 3, 8, device="meta").transpose(1, 2)
    out = sdpa(query, query, query[..., :4])
    assert out.device.type == "meta"
    assert out.shape == (2, 3, 5, 4)
    assert out.stride() == (60, 4, 12, 1)
    with pytest.raises(UnsupportedError):
        sdpa(query, query, query, return_info=True)


def test_listeners_hear_of_every_call():
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    with listening([]) as outer:
        sdpa(query, key, value)
        with listening([]) as inner, pytest.warns(FallbackWarning):
            sdpa(query, key, value, dropout_p=0.1)
    assert [i.fell_back for i in outer] == [None, "dropout"]
    assert [i.fell_back for i in inner] == ["dropout"]


def test_cpu_tensors_are_not_copied_on_their_way():
    from adaattn_torch.arrays import from_backend, to_backend  # noqa: PLC0415

    for dtype in DTYPES:
        tensor = torch.randn(2, 3).to(dtype)
        array = to_backend(tensor.requires_grad_())
        assert not array.requires_grad
        assert from_backend(array).data_ptr() == tensor.data_ptr()
    shared = np.arange(6, dtype=np.float32)
    assert from_backend(shared).data_ptr() == shared.ctypes.data


@pytest.mark.parametrize("budget", [True, "0.1", [0.1], float("nan")])
def test_a_budget_is_a_number(budget):
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ArgumentError):
        sdpa(x, x, x, budget=budget)


def test_a_scale_of_text_is_refused_as_pytorch_does():
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(TypeError):
        sdpa(x, x, x, scale="1")
