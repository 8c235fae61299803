"""Facts and row errors are what the theorems take them for: upper bounds, and the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.backend import ORACLE_SHARE
from adaattn_core.formats import FORMATS, get_format, round_to_format
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.testing.kit import Kit, assert_certificate_holds, head_rows
from adaattn_core.testing.oracles import (
    exact_attention,
    head_arrays,
    rms_row_norm,
    row_errors,
    row_norms,
    visible_tile,
)
from adaattn_core.testing.strategies import ProblemSpec

WIDE = [name for name, info in FORMATS.items() if not info.is_quantised]
WEIGHTLESS = 700.0
"""A key this far below its row's largest mask entry may be hidden: float64 cannot hold exp."""
SLACK = 1e-6
"""Relative allowance for norms computed in float32."""
RMS_LOWER = 1e-3
"""How far the output's size may be understated, relatively: a larger bound, no wrong one."""


@pytest.mark.parametrize("name", WIDE)
@given(data=st.data())
def test_facts_cover_the_truth(kit: Kit, name: str, data: st.DataObject) -> None:
    """Norms, residuals and diameters are not understated, the output's size not overstated."""
    kit.require(qk=name, pv=name)
    plan = kit.head(qk=name, pv=name)
    host = (spec := data.draw(kit.specs(plan))).build()
    outcome = kit.run(spec.build(kit.home.send), plan)
    for index in host.heads():
        facts, rows = outcome.facts[index], outcome.out[head_rows(host, index)]
        assert facts.nonfinite == (not np.isfinite(rows).all()), f"head {index}"
        if facts.nonfinite:
            continue
        for what, least in _least_facts(host, index, plan).items():
            said = getattr(facts, what)
            assert said >= least * (1 - SLACK), f"head {index}: {what} {said:.6g} < {least:.6g}"
        size = rms_row_norm(rows)
        assert facts.output_rms <= size * (1 + SLACK), f"head {index}: output_rms overstated"


def _least_facts(
    problem: AttentionProblem, index: HeadIndex, plan: HeadPlan
) -> dict[str, float]:
    """Lower limits of the upper bounds, from the inputs alone."""
    arrays = head_arrays(problem, index)
    rows = np.arange(len(arrays.query))
    visible, bias = visible_tile(problem, index, rows, 0, len(arrays.key))
    # Facts of a narrower run of float64 input may speak of it or of its float32 cast: the
    # certificate accounts for the cast itself.
    cast: Any = np.float32 if problem.dtype == "f64" and plan.qk != "f64" else np.float64
    q, k, v = (
        x[seen].astype(cast).astype(np.float64)
        for x, seen in (
            (arrays.query, visible.any(axis=1)),
            (arrays.key, visible.any(axis=0)),
            (arrays.value, visible.any(axis=0)),
        )
    )
    residuals = {
        "query_residual_upper": _residual(q, plan.qk),
        "key_residual_upper": _residual(k, plan.qk),
        "value_residual_upper": _residual(v, plan.pv),
    }
    if problem.dtype == "f64":
        moved = dict(zip(residuals, (_peak(x) * 2.0**-24 for x in (q, k, v)), strict=True))
        residuals = {name: max(x - moved[name], 0.0) for name, x in residuals.items()}
    least = dict(residuals)
    for what, x in (("query", q), ("key", k), ("value", v)):
        kept = _peak(x) - residuals[f"{what}_residual_upper"]
        least[f"{what}_norm_upper"] = max(kept, 0.0)
    spread = _peak(v - v[:1]) - 2 * residuals["value_residual_upper"]
    least["value_diameter_upper"] = max(spread, 0.0)
    # A row's mask may be shifted as a whole, and keys that it makes weightless do not count.
    added = np.where(visible, bias, -np.inf)
    top = added.max(axis=1, initial=-1e300, keepdims=True)
    kept = visible & (added > top - WEIGHTLESS)
    spread = np.subtract(top, added, where=kept, out=np.zeros(kept.shape)).max(initial=0.0)
    least["bias_max_abs"] = float(spread) / 2
    least["keys_max"] = float(visible.sum(axis=1).max(initial=0))
    return least


def _residual(x: NDArray[np.float64], name: str) -> float:
    """No rounding to the format leaves less than rounding to nearest."""
    nearest = round_to_format(x, name).astype(np.float64)
    return _peak(x - nearest)


def _peak(x: NDArray[np.float64]) -> float:
    return float(row_norms(x).max(initial=0.0))


def test_dense_facts_of_a_plain_problem(kit: Kit) -> None:
    """Dense computes every visible score and says so; the facts hold numbers, not defaults."""
    spec = ProblemSpec(len_q=48, len_kv=64, dim_qk=64, dim_v=64, dtype=kit.dtype(kit.head()))
    outcome = kit.run(spec.build(kit.home.send), kit.head())
    facts = outcome.facts[0, 0]
    assert (facts.share, facts.dropped_mass_upper, facts.keys_max) == (1.0, 0.0, 64)
    size = rms_row_norm(outcome.out[0, 0])
    assert (1 - RMS_LOWER) * size <= facts.output_rms <= (1 + SLACK) * size
    assert facts.output_rms <= facts.value_norm_upper


@pytest.mark.parametrize("name", ["tf32", "f16", "bf16"])
def test_bound_is_attained(kit: Kit, name: str) -> None:
    """Where the theorem is attained, the certificate lies between the error and thrice it.

    Two keys straddle a rounding midpoint of the format, so the format sees one step between
    them where the truth is nearly none; the query (exact in the format) turns that step into a
    logit difference of one, and the values -1 and +1 show all of it.
    """
    kit.require(qk=name, pv=name)
    plan = kit.head(qk=name, pv=name)
    host = _midpoint_problem(name)
    if not kit.accepts(ProblemSpec(dim_qk=host.dim_qk, dim_v=host.dim_v), plan):
        pytest.skip(f"backend {kit.name} refuses f32 inputs for {name}/{name}")
    result = kit.certify(kit.place(host), plan)
    exact = exact_attention(host)
    assert_certificate_holds(kit, result, host, exact)
    out = kit.home.fetch(result.out).astype(np.float64)
    error = float(row_errors(out, exact.out).max())
    certified = result.certificate[0, 0].upper * rms_row_norm(out[0, 0])
    assert error > 0.1, "the midpoint must be felt"
    assert error <= certified <= 3 * error


def _midpoint_problem(name: str) -> AttentionProblem:
    bits = get_format(name).significand_bits
    step = 2.0 ** (1 - bits)
    middle, nudge = 1.0 + step / 2, 2.0**-20
    dim = 8
    key = np.zeros((1, 1, 2, dim), np.float32)
    key[0, 0, :, 0] = middle - nudge, middle + nudge
    query = np.zeros((1, 1, 4, dim), np.float32)
    query[..., 0] = 1.0 / step
    value = np.zeros((1, 1, 2, dim), np.float32)
    value[0, 0, :, 0] = -1.0, 1.0
    return AttentionProblem.from_arrays(query, key, value, scale=1.0)


@given(data=st.data())
def test_row_errors_are_the_truth(kit: Kit, data: st.DataObject) -> None:
    """Errors and sizes of sampled rows agree with the oracle within the stated accuracy."""
    sampling = kit.sampling()
    plan = kit.narrowest()
    values = ("normal", "outliers", "needles", "constant")
    spec = data.draw(kit.specs(plan, values=values))
    problem, host = spec.build(kit.home.send), spec.build()
    outcome = kit.run(problem, plan)
    rng = np.random.default_rng(spec.seed)
    rows = {
        i: np.sort(rng.integers(0, host.sequences[i[0]].len_q, 20))
        for i in host.heads()
        if host.sequences[i[0]].len_q
    }
    enough = data.draw(st.sampled_from((0.0, 1e-4, 0.1)), label="enough")
    found = sampling.row_errors(problem, outcome.raw, rows, enough=enough)
    best = sampling.row_errors(problem, outcome.raw, rows)
    exact = exact_attention(host)
    for index, chosen in rows.items():
        little = ORACLE_SHARE * enough * outcome.raw.facts[index].output_rms
        assert found[index].oracle_upper <= max(little, best[index].oracle_upper)
        where = head_rows(host, index)
        truth = row_errors(outcome.out[where], exact.out[where])[chosen]
        size = row_norms(exact.out[where])[chosen]
        allowed = found[index].oracle_upper + exact.error_upper[index]
        assert np.abs(found[index].error - truth).max(initial=0.0) <= allowed
        assert np.abs(found[index].exact_norm - size).max(initial=0.0) <= allowed
