"""What PyTorch's own tests of its function hold it to, as properties of ours."""

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

from adaattn_torch import FallbackWarning
from adaattn_torch import scaled_dot_product_attention as sdpa

_spec = importlib.util.spec_from_file_location("held", Path(__file__).with_name("conftest.py"))
held = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(held)
assert_as_good, oracle = held.assert_as_good, held.oracle

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)
small = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _no_fallback():
    """Everything here is computed by a backend unless a test says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(query, key, value, mask=None, **options):
    ours = sdpa(query, key, value, mask, **options)
    theirs = F.scaled_dot_product_attention(query, key, value, mask, **options)
    exact = oracle(query, key, value, mask, **options)
    assert_as_good(ours, theirs, exact, value)
    return ours


def outcome(function, *arguments, **options):
    """What a call returns, or what it raises."""
    try:
        return function(*arguments, **options)
    except (RuntimeError, IndexError) as error:
        return error


def assert_same_outcome(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, Exception):
        assert str(ours) == str(theirs)
    else:
        torch.testing.assert_close(ours, theirs)


@small
@given(seeds, dtypes, st.data())
def test_expanded_keys_and_values(seed, dtype, data):
    """Axes of stride 0: one key head for all, one batch entry for all, one key for all."""
    query = randn(seed, 2, 3, 5, 8, dtype=dtype)
    shapes = [[data.draw(st.sampled_from([1, n])) for n in (2, 3, 6)] + [8] for _ in range(2)]
    key, value = (
        randn(seed + i, *shape, dtype=dtype).expand(2, 3, 6, 8)
        for i, shape in enumerate(shapes)
    )
    check(query, key, value)


@small
@given(seeds, dtypes, st.permutations(range(4)), st.sampled_from([3, 8]))
def test_strides_of_the_output_follow_the_query(seed, dtype, order, dim_v):
    sizes = (2, 3, 5, 8)
    made = randn(seed, *(sizes[axis] for axis in order), dtype=dtype)
    query = made.permute([order.index(axis) for axis in range(4)])
    key, value = randn(seed, 2, 3, 6, 8, dtype=dtype), randn(seed, 2, 3, 6, dim_v, dtype=dtype)
    out = sdpa(query, key, value)
    by_stride = sorted(range(4), key=lambda axis: -query.stride(axis))
    assert sorted(range(4), key=lambda axis: -out.stride(axis)) == by_stride
    assert out.permute(by_stride).is_contiguous()
    assert torch.equal(out, sdpa(query.contiguous(), key, value))


@small
@given(seeds, dtypes, st.booleans(), st.data())
def test_rows_that_see_nothing_are_zero_in_value_and_gradient(seed, dtype, additive, data):
    query, key, value = (randn(seed + i, 2, 3, 6, 8, dtype=dtype) for i in range(3))
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=36, max_size=36)))
    hidden = hidden.reshape(2, 3, 6, 1)
    mask = ((randn(seed, 2, 3, 6, 6) < 1) & ~hidden).contiguous()
    blind = ~mask.any(-1)
    if additive:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    out = check(query, key, value, mask)
    assert (out[blind] == 0).all()
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(sdpa(query, key, value, mask).sum(), query)
    assert (gradient[blind] == 0).all()
    assert torch.isfinite(gradient).all()


@small
@given(seeds, dtypes, st.sampled_from(["none", "boolean", "additive"]), st.booleans())
def test_grouped_heads_with_masks_and_five_dimensions(seed, dtype, kind, five):
    lead = (2, 2) if five else (2,)
    query = randn(seed, *lead, 6, 4, 8, dtype=dtype)
    key, value = (randn(seed + i, *lead, 2, 7, 8, dtype=dtype) for i in (1, 2))
    mask = None
    if kind == "boolean":
        mask = randn(seed, *lead, 6, 4, 7) < 0.5
    elif kind == "additive":
        mask = randn(seed, 6, 4, 7, dtype=dtype)
    check(query, key, value, mask, enable_gqa=True)


@small
@given(seeds, dtypes, st.integers(0, 9), st.integers(0, 9))
def test_causal_masks_of_any_two_lengths(seed, dtype, len_q, len_kv):
    query = randn(seed, 1, 2, len_q, 8, dtype=dtype)
    key, value = (randn(seed + i, 1, 2, len_kv, 8, dtype=dtype) for i in (1, 2))
    if len_kv:
        check(query, key, value, is_causal=True)
    else:
        assert (sdpa(query, key, value, is_causal=True) == 0).all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lower right causal bias will produce NaNs")
        biases = [make(len_q, len_kv) for make in (causal_upper_left, causal_lower_right)]
    column = torch.arange(len_kv)
    for bias, shift in zip(biases, (0, len_kv - len_q), strict=True):
        allowed = column <= torch.arange(len_q)[:, None] + shift
        out = sdpa(query, key, value, bias)
        assert_as_good(out, out, oracle(query, key, value, allowed), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_the_lowest_finite_number_are_not_hidden(dtype):
    """Models add it for -inf; a row of it alone is then an average, as in PyTorch."""
    query, key, value = (randn(i, 1, 2, 4, 8, dtype=dtype) for i in range(3))
    mask = torch.zeros(4, 4, dtype=dtype)
    mask[1] = torch.finfo(dtype).min
    mask[2, 2:] = torch.finfo(dtype).min
    with np.errstate(over="ignore"):  # float64's lowest number is beyond float32
        ours = sdpa(query, key, value, mask)
    theirs = F.scaled_dot_product_attention(query, key, value, mask)
    assert torch.isfinite(ours).all()
    unit = held.ROUNDOFF[dtype]
    assert (ours - theirs).abs().max() <= 16 * unit * value.abs().max()


@small
@given(seeds, dtypes, st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 2))
def test_what_is_not_finite_and_seen_is_not_hidden(seed, dtype, bad, which):
    """Where the formula's result is not a number, ours is none either; elsewhere they agree.

    The formula written out: PyTorch's fused CPU kernel turns a query of NaN into a row of
    zeros, and its plain one a row whose seen scores are all -inf.
    """
    given = [randn(seed + i, 1, 1, 5, 8, dtype=dtype) for i in range(3)]
    given[which][0, 0, 2, 3] = bad
    ours = sdpa(*given)
    query, key, value = given
    theirs = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    fine = torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(ours), fine)
    unit = held.ROUNDOFF[dtype]
    largest = torch.where(fine, theirs, 0).abs().max()
    assert (torch.where(fine, ours - theirs, 0).abs() <= 64 * unit * (1 + largest)).all()


@small
@given(seeds, dtypes, st.sampled_from([1e-3, 1.0, 30.0]))
def test_scales(seed, dtype, scale):
    given = [randn(seed + i, 1, 2, 5, 8, dtype=dtype) for i in range(3)]
    check(*given, scale=scale)
    flipped = sdpa(-given[0], *given[1:], scale=scale)
    assert torch.equal(sdpa(*given, scale=-scale), flipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_autocast(dtype, mask):
    query, key, value = (randn(i, 1, 2, 9, 16) for i in range(3))
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": randn(7, 9, 9) < 0.5},
        "additive": {"attn_mask": randn(7, 9, 9)},
    }[mask]
    with torch.autocast("cpu", dtype):
        ours = sdpa(query, key, value, **options)
        theirs = F.scaled_dot_product_attention(query, key, value, **options)
        wide = sdpa(query.double(), key.double(), value.double())
        with torch.autocast("cpu", enabled=False):
            exact = sdpa(query, key, value, **options)
    rounded = [x.to(dtype) for x in (query, key, value)]
    if mask == "additive":
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    bias = options.get("attn_mask")
    truth = oracle(*rounded, bias, is_causal=mask == "causal")
    assert_as_good(ours, theirs, truth, value)
    assert ours.dtype == dtype
    assert exact.dtype == torch.float32
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_go_to_pytorch_visibly(transform):
    x = randn(0, 3, 2, 5, 8)
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):

        def loss(y, function=function):
            return function(y, y, y).square().sum()

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if transform == "grad":
                results.append(torch.func.grad(loss)(x))
            elif transform == "jvp":
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    results.append(torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1])
            else:
                results.append(torch.vmap(torch.func.grad(loss))(x[:, None]))
        heard = any(issubclass(w.category, FallbackWarning) for w in said)
        assert heard == (function is sdpa)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.ones(3, dtype=torch.bool)},
        {"attn_mask": torch.zeros(6)},
        {"attn_mask": torch.zeros(1, 1, 1, 1)},
        {"attn_mask": torch.zeros(5, 1)},
    ],
)
def test_masks_of_few_dimensions_mean_what_they_mean_to_pytorch(arguments):
    query, key, value = randn(0, 1, 2, 5, 8), randn(1, 1, 2, 6, 8), randn(2, 1, 2, 6, 8)
    expected = outcome(F.scaled_dot_product_attention, query, key, value, **arguments)
    assert_same_outcome(outcome(sdpa, query, key, value, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused_or_computed_by_pytorch(dtype):
    x = torch.ones(1, 2, 5, 8).to(dtype)
    expected = outcome(F.scaled_dot_product_attention, x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_same_outcome(outcome(sdpa, x, x, x), expected)


def test_inputs_are_left_alone_and_calls_repeat():
    given = [randn(i, 1, 2, 5, 8) for i in range(3)] + [randn(3, 5, 5)]
    copies, versions = [x.clone() for x in given], [x._version for x in given]
    first = sdpa(*given)
    again = sdpa(*given)
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()  # a result is never taken back
    first.zero_()
    assert all(torch.equal(x, y) for x, y in zip(given, copies, strict=True))
    assert [x._version for x in given] == versions
    assert torch.equal(again, sdpa(*given))


def test_parameters_and_subclasses():
    class Named(torch.Tensor):
        pass

    x = randn(0, 1, 2, 5, 8)
    parameter = torch.nn.Parameter(x.clone())
    out = sdpa(parameter, parameter, parameter)
    assert out.requires_grad
    torch.testing.assert_close(out.detach(), F.scaled_dot_product_attention(x, x, x))
    named = sdpa(x.as_subclass(Named), x, x)
    torch.testing.assert_close(named.as_subclass(torch.Tensor), out.detach())


@pytest.mark.parametrize("mask", [None, "additive"])
def test_second_derivatives(mask):
    given = [randn(i, 1, 2, 4, 3, dtype=torch.float64).requires_grad_() for i in range(3)]
    if mask:
        given.append(randn(5, 4, 4, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradgradcheck(sdpa, given, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*does not support automatic differentiation")
def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint  # noqa: PLC0415

    x = randn(0, 1, 2, 5, 8).requires_grad_()
    (plain,) = torch.autograd.grad(sdpa(x, x, x).square().sum(), x)
    for reentrant in (False, True):
        out = checkpoint(sdpa, x, x, x, use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(x.grad, plain)
        x.grad = None
