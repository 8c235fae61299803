"""Dense attention in every format is right: by theorem, and as good as a naive computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core import bounds
from adaattn_core.facts import RunFacts
from adaattn_core.formats import FORMATS, get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.kit import Kit, Outcome, assert_certificate_holds, head_rows
from adaattn_core.testing.oracles import (
    exact_attention,
    naive_attention,
    relative_frobenius,
    row_norms,
)
from adaattn_core.testing.strategies import MaskSpec, ProblemSpec

ALL_FORMATS = [(operand, name) for operand in ("qk", "pv") for name in FORMATS]
FLOOR_ULP = 8
"""Rounding steps of the working format that the 2x rule grants on top."""


def _plan(kit: Kit, operand: str, name: str, **more: Any) -> HeadPlan:
    kit.require(**{operand: name})
    return kit.head(**{operand: name}, **more)


def _floor(plan: HeadPlan) -> float:
    working = "f64" if plan.qk == plan.pv == "f64" else "f32"
    return FLOOR_ULP * get_format(working).unit_roundoff


@pytest.mark.parametrize(("operand", "name"), ALL_FORMATS)
@given(data=st.data())
def test_worst_case_holds(kit: Kit, operand: str, name: str, data: st.DataObject) -> None:
    """No row errs by more than the theorem's bound, whatever the shapes, masks and values.

    Examples are steered towards the bound; ``--hypothesis-show-statistics`` prints how near the
    closest one came.
    """
    plan = _plan(kit, operand, name)
    spec = data.draw(kit.specs(plan))
    result = kit.certify(spec.build(kit.home.send), plan)
    target(assert_certificate_holds(kit, result, spec.build()), label="error / certified")


def _lse_floor(outcome: Outcome, lse: NDArray[np.float64]) -> float:
    """Return rounding steps of a float32 lse, and the error of an exponential if one is stated.

    An output hardly feels an error that all exponentials share; their sum has all of it.
    """
    stated = [facts.arithmetic.exp_rel_upper or 0.0 for facts in outcome.facts.values()]
    size = float(np.sqrt(np.mean(lse[np.isfinite(lse)] ** 2)))
    return FLOOR_ULP * 2.0**-24 + max(stated, default=0.0) / size


@pytest.mark.parametrize(("operand", "name"), ALL_FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_within_twice_naive(kit: Kit, operand: str, name: str, seed: int) -> None:
    """The error is at most twice that of the naive same-format computation, plus a floor."""
    plan = _plan(kit, operand, name)
    spec = ProblemSpec(
        heads_kv=2, group=2, len_q=96, len_kv=160, dim_qk=64, dim_v=64, seed=seed,
        dtype=kit.dtype(plan),
    )  # fmt: skip
    if not kit.accepts(spec, plan):
        pytest.skip(f"backend {kit.name} refuses {spec.dtype} inputs for {plan.qk}/{plan.pv}")
    host = spec.build()
    exact = exact_attention(host)
    outcome, naive = (
        kit.run(spec.build(kit.home.send), plan),
        naive_attention(host, plan.qk, plan.pv),
    )
    for what in ("out", "lse"):
        truth = getattr(exact, what)
        usual = relative_frobenius(getattr(naive, what), truth)
        error = relative_frobenius(getattr(outcome, what), truth)
        floor = _floor(plan) if what == "out" else _lse_floor(outcome, truth)
        assert error <= 2 * usual + floor, f"{what}: error {error:.4g}, naive {usual:.4g}"


@pytest.mark.parametrize(("operand", "name"), ALL_FORMATS)
@given(data=st.data())
def test_lse_is_right(kit: Kit, operand: str, name: str, data: st.DataObject) -> None:
    """The log-sum-exp moves no further than the largest error of a score."""
    plan = _plan(kit, operand, name)
    host = (spec := data.draw(kit.specs(plan, values=("normal", "outliers")))).build()
    outcome = kit.run(spec.build(kit.home.send), plan)
    exact = exact_attention(host).lse
    for index in host.heads():
        where = head_rows(host, index)
        blind = exact[where] == -np.inf
        assert (outcome.lse[where][blind] == -np.inf).all(), "a row that sees nothing: -inf"
        moved = np.abs(outcome.lse[where][~blind] - exact[where][~blind])
        allowed = _lse_error_upper(host, plan, outcome.facts[index], exact[where][~blind])
        worst = float(moved.max(initial=0.0))
        assert worst <= allowed, f"head {index}: lse errs by {worst:.4g}, allowed {allowed:.4g}"


def _lse_error_upper(
    problem: AttentionProblem, plan: HeadPlan, facts: RunFacts, lse: NDArray[np.float64]
) -> float:
    """Theorems 2 and 7: rounded operands, summed products, float32 arithmetic on the lse."""
    norms = facts.query_norm_upper, facts.key_norm_upper
    rounded = bounds.score_error(
        problem.scale, *norms, facts.query_residual_upper, facts.key_residual_upper
    )
    size = (
        problem.scale
        * (norms[0] + facts.query_residual_upper)
        * (norms[1] + facts.key_residual_upper)
    )
    summed = bounds.product_sum_error(problem.dim_qk + FLOOR_ULP, plan.qk) * size
    largest = 1.0 + size + float(np.abs(lse).max(initial=0.0))
    steps = 2.0**-24 * (facts.keys_max + 4 * FLOOR_ULP)
    stated = facts.arithmetic.exp_rel_upper or 0.0  # all exponentials of a sum may share it
    return float(rounded) + float(summed) + stated + steps * largest


def test_rows_without_a_key_are_zero(kit: Kit) -> None:
    """Output 0 and lse -inf where nothing is visible, beside rows that see something."""
    kit.require(masks=("causal",))
    plan = kit.head()
    spec = ProblemSpec(
        len_q=40, len_kv=16, dim_qk=64, dim_v=64, group=2,
        dtype=kit.dtype(kit.head()),
        mask=MaskSpec(window=(None, 0), alignment="bottom_right"),
    )  # fmt: skip
    outcome = kit.run(spec.build(kit.home.send), plan)
    assert (outcome.out[:, :, :24] == 0).all()
    assert (outcome.lse[:, :, :24] == -np.inf).all()
    assert (row_norms(outcome.out[:, :, 24:]) > 0).all()
    assert np.isfinite(outcome.lse[:, :, 24:]).all()


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 0), (1, 0, 8), (1, 0, 0), (0, 8, 8), (2, 1, 1)],
    ids=["no keys", "no rows", "neither", "no batch", "one key"],
)
@pytest.mark.parametrize("lengths", ["full", "lengths", "ragged"])
def test_empty_and_smallest_problems(
    kit: Kit, shape: tuple[int, int, int], lengths: str
) -> None:
    """Problems without keys, rows or batch entries are ordinary problems."""
    batch, len_q, len_kv = shape
    if lengths != "full":
        kit.require(masks=(lengths,))
        if batch == 0:
            pytest.skip("a mask with lengths needs a batch entry")
    plan = kit.head()
    spec = ProblemSpec(
        batch=batch, heads_kv=2, group=2, len_q=len_q, len_kv=len_kv, dim_qk=64, dim_v=64,
        dtype=kit.dtype(kit.head()), mask=MaskSpec(lengths=lengths),
    )  # fmt: skip
    result = kit.certify(spec.build(kit.home.send), plan)
    out = kit.home.fetch(result.out)
    host = spec.build()
    assert out.shape == (host.batch, 4, len_q, 64)
    assert kit.home.fetch(result.lse).shape == (host.batch, 4, len_q)
    assert (result.certificate.upper < 1).all()
    assert_certificate_holds(kit, result, host)
