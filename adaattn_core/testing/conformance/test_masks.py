"""Masks mean what they say, and what a row cannot see cannot touch it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.kit import (
    Kit,
    absolute_bound,
    assert_certificate_holds,
    assert_same_result,
    head_rows,
)
from adaattn_core.testing.oracles import (
    exact_attention,
    rms_row_norm,
    row_errors,
    visible_tile,
)
from adaattn_core.testing.strategies import ProblemSpec, mask_specs

FEW_VALUES = ("normal", "constant", "outliers")


def _visible(problem: AttentionProblem) -> NDArray[np.bool_]:
    """Visibility of a problem that is not ragged, shape (batch, heads_q, len_q, len_kv)."""
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
    visible = np.zeros(shape, bool)
    for index in problem.heads():
        span = problem.sequences[index[0]]
        rows = np.arange(span.len_q)
        tile, _ = visible_tile(problem, index, rows, 0, span.len_kv)
        visible[index][:, : span.len_kv] = tile
    return visible


@pytest.mark.parametrize("kind", ["causal", "window", "lengths"])
@pytest.mark.parametrize("other", ["boolean", "additive"])
@given(data=st.data())
def test_structural_mask_equals_its_array(
    kit: Kit, kind: str, other: str, data: st.DataObject
) -> None:
    """A causal, window or length mask equals the array that spells it out."""
    kit.require(masks=(kind, other))
    plan = kit.head()
    masks = mask_specs((kind,)).filter(lambda m: bool(m.kinds()))
    spec = data.draw(
        kit.specs(
            plan,
            masks=masks,
            values=FEW_VALUES,
            storages=("contiguous",),
            poison=st.just(False),
        )
    )
    host = spec.build()
    visible = _visible(host)
    spelled = (
        Mask.boolean(visible)
        if other == "boolean"
        else Mask.additive(np.where(visible, np.float32(0), np.float32(-np.inf)))
    )
    same = AttentionProblem.from_arrays(
        host.query, host.key, host.value, mask=spelled, scale=host.scale
    )
    first = kit.certify(kit.place(host), plan)
    second = kit.certify(kit.place(same), plan)
    if kind == "lengths":  # the spelled-out problem has no padding to cut off
        assert_certificate_holds(kit, second, same, exact_attention(host))
    assert_same_result(kit, first, host, second, same)


@given(data=st.data())
def test_unseen_nonfinite_never_leaks(kit: Kit, data: st.DataObject) -> None:
    """NaN and Inf in keys and values that no row sees change nothing, to the last bit."""
    plan = kit.head()
    spec = data.draw(kit.specs(plan, values=FEW_VALUES, poison=st.just(True)))
    poisoned = kit.certify(spec.build(kit.home.send), plan)
    clean = kit.certify(replace(spec, poison=False).build(kit.home.send), plan)
    assert_certificate_holds(kit, poisoned, spec.build())
    for name in ("out", "lse"):
        first, second = (kit.home.fetch(getattr(r, name)) for r in (poisoned, clean))
        np.testing.assert_array_equal(first, second, err_msg=name)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@given(data=st.data())
def test_nonfinite_reaches_only_rows_that_see_it(
    kit: Kit, where: str, data: st.DataObject
) -> None:
    """One NaN spoils the rows that see it; all others are as right as without it."""
    plan = kit.head()
    sizes = st.integers(1, 80)
    spec = data.draw(
        kit.specs(plan, values=("normal",), lengths=sizes, storages=("contiguous",))
    )
    host, clean = spec.build(), spec.build()
    array = getattr(host, where)
    array[tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)] = np.nan
    result = kit.certify(kit.place(host), plan)
    exact = exact_attention(host).out
    out = kit.home.fetch(result.out).astype(np.float64)
    lost = np.asarray(np.isnan(exact).any(axis=-1))
    np.testing.assert_array_equal(~np.isfinite(out).all(axis=-1), lost)
    without = kit.certify(kit.place(clean), plan)
    for index in host.heads():
        rows = head_rows(host, index)
        errors = row_errors(out[rows], exact[rows])[np.flatnonzero(~lost[rows])]
        size = rms_row_norm(kit.home.fetch(without.out)[rows])
        allowed = absolute_bound(without.certificate[index].upper, size)
        assert errors.max(initial=0.0) <= allowed, f"head {index}"


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_visible_nonfinite_is_reported(kit: Kit, where: str, bad: float) -> None:
    """A visible NaN or Inf makes its head's bound infinite, and no other head's."""
    plan = kit.head()
    spec = ProblemSpec(
        heads_kv=2, len_q=40, len_kv=40, dim_qk=64, dim_v=64, dtype=kit.dtype(kit.head())
    )
    host = spec.build()
    getattr(host, where)[0, 1, 20, 3] = bad
    result = kit.certify(kit.place(host), plan)
    assert result.certificate[0, 1].upper == np.inf
    assert np.isfinite(result.certificate[0, 0].upper)
    lost = np.isnan(exact_attention(host).out).any(axis=-1)
    out = kit.home.fetch(result.out).astype(np.float64)
    assert not np.isfinite(out[lost]).all(axis=-1).any(), (
        "a row that is NaN in exact arithmetic came back finite"
    )
    assert_certificate_holds(kit, result, host)


@given(data=st.data())
def test_ragged_equals_single_sequences(kit: Kit, data: st.DataObject) -> None:
    """A packed batch gives what its sequences give one at a time."""
    kit.require(masks=("ragged",))
    plan = kit.head()
    windows = tuple(k for k in ("causal", "window") if k in kit.capabilities.masks)
    masks = mask_specs(windows).map(lambda m: replace(m, lengths="ragged"))
    spec = data.draw(kit.specs(plan, masks=masks, values=FEW_VALUES))
    host = spec.build()
    packed = kit.certify(kit.place(host), plan)
    for span in host.sequences:
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        alone = AttentionProblem.from_arrays(
            host.query[:, :, rows],
            host.key[:, :, keys],
            host.value[:, :, keys],
            mask=replace(host.mask, cu_seqlens_q=None, cu_seqlens_kv=None),
            scale=host.scale,
        )
        single = kit.certify(kit.place(alone), plan)
        heads = {(span.index, h): (0, h) for h in range(host.heads_q)}
        assert_same_result(kit, packed, host, single, alone, heads)


@given(data=st.data())
def test_padding_is_invisible(kit: Kit, data: st.DataObject) -> None:
    """Key lengths give what arrays cut to those lengths give, batch entry by batch entry."""
    kit.require(masks=("lengths",))
    plan = kit.head()
    windows = tuple(k for k in ("causal", "window") if k in kit.capabilities.masks)
    masks = mask_specs(windows).map(lambda m: replace(m, lengths="lengths"))
    spec = data.draw(kit.specs(plan, masks=masks, values=FEW_VALUES))
    host = spec.build()
    padded = kit.certify(kit.place(host), plan)
    for span in host.sequences:
        entry, keys = slice(span.batch, span.batch + 1), slice(0, span.len_kv)
        alone = AttentionProblem.from_arrays(
            host.query[entry],
            host.key[entry][:, :, keys],
            host.value[entry][:, :, keys],
            mask=replace(host.mask, lengths=None),
            scale=host.scale,
        )
        single = kit.certify(kit.place(alone), plan)
        heads = {(span.index, h): (0, h) for h in range(host.heads_q)}
        assert_same_result(kit, padded, host, single, alone, heads)
