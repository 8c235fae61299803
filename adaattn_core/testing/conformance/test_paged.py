"""Pages are read as what they stand for: in their order, no key more and no key less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st

from adaattn_core.api import attention
from adaattn_core.errors import UnsupportedError
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.result import AttentionResult
from adaattn_core.structure import Dense, ScoreSkip, Structure
from adaattn_core.testing.kit import WORST_CASE, Kit, assert_certificate_holds
from adaattn_core.testing.paged import PagedSpec, paged_specs

SPEC = PagedSpec(starts=(0, 3), lengths=(37, 150), heads_kv=2, group=2, page_len=64,
                 dim_qk=64, dim_v=64)  # fmt: skip


def _plan(kit: Kit, structure: Structure) -> tuple[HeadPlan, str]:
    """Plan and input dtype of a paged problem; skips where the backend takes no pages."""
    if structure.kind not in kit.capabilities.paged:
        pytest.skip(f"backend {kit.name} does not offer {structure.kind} over pages")
    plan = kit.narrowest() if kit.name != "numpy" else kit.head()
    plan = replace(plan, structure=structure)
    return plan, kit.dtype(plan)


def _run(kit: Kit, spec: PagedSpec, plan: HeadPlan) -> AttentionResult:
    problem = spec.problem(kit.home.send)
    result = attention(
        problem.query, problem.paged, mask=spec.mask, backend=kit.name,
        plan=Plan.uniform(problem, plan), budget=WORST_CASE,
    )  # fmt: skip
    assert np.isfinite(kit.home.fetch(result.out).astype(np.float64)).all(), "unseen NaN leaked"
    return result


def _taken(kit: Kit, spec: PagedSpec, plan: HeadPlan) -> None:
    """Skip the test where the backend refuses such pages; never the one that all must take."""
    try:
        _run(kit, spec, plan)
    except UnsupportedError as error:
        pytest.skip(f"backend {kit.name}: {error.got}")


@pytest.mark.parametrize("narrow", ["", "i8", "e4m3"])
@pytest.mark.parametrize("structure", [Dense(), ScoreSkip(lam=1e-3)], ids=lambda s: s.kind)
@given(data=st.data())
def test_paged_worst_case_holds(
    kit: Kit, narrow: str, structure: Structure, data: st.DataObject
) -> None:
    """The certificate covers what 8-bit pages were rounded from, ragged, padded and empty."""
    plan, dtype = _plan(kit, structure)
    fixed: dict[str, Any] = {"dtype": dtype, "narrow": narrow}
    if kit.name != "numpy":
        fixed |= {"page_len": 64, "dim_qk": 64, "dim_v": 64}
    spec = data.draw(paged_specs(**fixed))
    result = _run(kit, spec, plan)
    target(assert_certificate_holds(kit, result, spec.dense()), label="error / certified")


@pytest.mark.parametrize("narrow", ["", "i8", "e4m3"])
def test_pages_may_lie_anywhere(kit: Kit, narrow: str) -> None:
    """Where pages lie changes no bit."""
    plan, dtype = _plan(kit, Dense())
    spec = replace(SPEC, narrow=narrow, dtype=dtype)
    _taken(kit, spec, plan)
    first, second = (_run(kit, replace(spec, order=n), plan) for n in (1, 2))
    assert (kit.home.fetch(first.out) == kit.home.fetch(second.out)).all()
    assert (kit.home.fetch(first.lse) == kit.home.fetch(second.lse)).all()


@pytest.mark.parametrize("causal", [False, True])
def test_paged_rows_without_and_with_one_key(kit: Kit, causal: bool) -> None:
    """No key: 0 and -inf. One key: its value, exactly as stored."""
    plan, dtype = _plan(kit, Dense())
    spec = replace(SPEC, starts=(5, 2, 0), lengths=(5, 3, 64), causal=causal, dtype=dtype)
    result = _run(kit, spec, plan)
    out, lse = (kit.home.fetch(x).astype(np.float64) for x in (result.out, result.lse))
    assert (out[0] == 0).all()
    assert (lse[0] == -np.inf).all()
    value = spec.arrays[2][1, :, 2].astype(np.float64)
    assert (out[1, :, 0] == np.repeat(value, spec.group, axis=0)).all()


def test_wide_pages_equal_arrays(kit: Kit) -> None:
    """On wide pages the log-sum-exp is that of the same keys as arrays."""
    plan, dtype = _plan(kit, Dense())
    spec = replace(SPEC, dtype=dtype, causal=True, len_q=3)
    result, dense = _run(kit, spec, plan), spec.dense()
    placed = kit.place(dense)
    arrays = kit.outcome(kit.backend.run(placed, Plan.uniform(placed, plan)))
    lse = kit.home.fetch(result.lse).astype(np.float64)
    assert np.abs(lse - arrays.lse).max() <= 2.0**-20 * np.abs(arrays.lse).max()


def test_backends_without_pages_refuse_them(kit: Kit) -> None:
    """Pages are never read as something else."""
    if kit.capabilities.paged:
        pytest.skip(f"backend {kit.name} offers pages")
    head = kit.head()
    problem = replace(SPEC, dtype=kit.dtype(head)).problem(kit.home.send)
    with pytest.raises(UnsupportedError, match="pages"):
        attention(problem.query, problem.paged, backend=kit.name)
