"""Softcap and sinks: right where a backend claims them, refused where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, target
from hypothesis import strategies as st

from adaattn_core.errors import UnsupportedError
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem
from adaattn_core.scores import SINKS, SOFTCAP
from adaattn_core.structure import Dense, LowRank, ScoreSkip, Structure
from adaattn_core.testing.kit import Kit, assert_certificate_holds
from adaattn_core.testing.oracles import exact_attention, naive_attention, relative_frobenius
from adaattn_core.testing.strategies import MaskSpec, ProblemSpec

RULES = {
    "softcap": (SOFTCAP,),
    "sinks": (SINKS,),
    "both": (SOFTCAP, SINKS),
}
FLOOR_ULP = 16
"""Rounding steps of the working format that the 2x rule grants on top."""
SPEC = ProblemSpec(heads_kv=2, group=2, len_q=96, len_kv=160, dim_qk=64, dim_v=64)


def _require(kit: Kit, rules: tuple[str, ...], structure: str = "dense") -> None:
    """Skip the test unless the backend claims the rules, with the structure."""
    known = dict(kit.capabilities.rules)
    for rule in rules:
        if structure not in known.get(rule, ()):
            pytest.skip(f"backend {kit.name} does not offer {rule} for {structure}")


def _with(
    spec: ProblemSpec, kit: Kit | None, softcap: float | None, sinks: Any
) -> AttentionProblem:
    """Build the problem under rules, in the kit's home or, without a kit, in host memory."""
    problem = spec.build() if kit is None else spec.build(kit.home.send)
    if sinks is not None and kit is not None:
        sinks = kit.home.send(sinks)
    return replace(problem, softcap=softcap, sinks=sinks)


def _sinks(heads: int) -> Any:
    """Sinks below, among and above usual scores, and one that is none."""
    return np.resize(np.array([0.5, -3.0, 5.0, -np.inf], np.float32), heads)


@pytest.mark.parametrize("structure", [Dense(), ScoreSkip(), LowRank(4)], ids=lambda s: s.kind)
@pytest.mark.parametrize("name", RULES)
@given(data=st.data())
def test_rules_worst_case_holds(
    kit: Kit, name: str, structure: Structure, data: st.DataObject
) -> None:
    """No row errs by more than the theorems say, whatever the cap and the sinks."""
    kit.require(structure=structure.kind)
    rules = RULES[name]
    _require(kit, rules, structure.kind)
    plan = kit.head(structure=structure)
    spec = data.draw(kit.specs(plan))
    softcap = data.draw(st.floats(0.125, 64.0)) if SOFTCAP in rules else None
    sinks = None
    if SINKS in rules:
        drawn = st.floats(-40, 40, width=32) | st.just(-np.inf)
        heads = spec.heads_kv * spec.group
        sinks = np.array(data.draw(st.lists(drawn, min_size=heads, max_size=heads)), np.float32)
    result = kit.certify(_with(spec, kit, softcap, sinks), plan)
    host = _with(spec, None, softcap, sinks)
    target(assert_certificate_holds(kit, result, host), label="error / certified")


@pytest.mark.parametrize("operand", ["f32", "bf16", "f16", "i8"])
@pytest.mark.parametrize("name", RULES)
def test_rules_within_twice_naive(kit: Kit, name: str, operand: str) -> None:
    """Out and lse, which counts the sinks, err at most twice as much as a naive computation."""
    rules = RULES[name]
    _require(kit, rules)
    kit.require(qk=operand)
    plan = kit.head(qk=operand)
    formats = kit.capabilities.rule_formats
    if formats is not None and not {plan.qk, plan.pv} <= set(formats):
        pytest.skip(f"backend {kit.name} does not offer {plan.qk}/{plan.pv} under rules")
    spec = replace(SPEC, dtype=kit.dtype(plan))
    if not kit.accepts(spec, plan):
        pytest.skip(f"backend {kit.name} refuses {spec.dtype} inputs for {plan.qk}/{plan.pv}")
    given_: tuple[Any, Any] = (
        1.5 if SOFTCAP in rules else None,
        _sinks(4) if SINKS in rules else None,
    )
    host = _with(spec, None, *given_)
    exact, naive = exact_attention(host), naive_attention(host, plan.qk, plan.pv)
    outcome = kit.run(_with(spec, kit, *given_), plan)
    stated = [facts.arithmetic.tanh_upper or 0.0 for facts in outcome.facts.values()]
    floor = FLOOR_ULP * get_format("f32").unit_roundoff + 2 * max(stated)
    for what in ("out", "lse"):
        truth = getattr(exact, what)
        usual = relative_frobenius(getattr(naive, what), truth)
        error = relative_frobenius(getattr(outcome, what), truth)
        assert error <= 2 * usual + floor, f"{what}: error {error:.4g}, naive {usual:.4g}"


def test_rules_of_rows_that_see_nothing(kit: Kit) -> None:
    """Output 0, and the sink for an lse; -inf where it is none."""
    _require(kit, (SINKS,))
    kit.require(masks=("lengths",))
    plan: HeadPlan = kit.head()
    spec = replace(SPEC, dtype=kit.dtype(plan), mask=MaskSpec(lengths="lengths"))
    problem = _with(spec, kit, None, _sinks(4))
    blind = replace(
        problem,
        mask=replace(problem.mask, lengths=(0,)),
        sequences=tuple(replace(s, kv_stop=s.kv_start) for s in problem.sequences),
    )
    outcome = kit.run(blind, plan)
    assert (outcome.out == 0).all()
    expected = np.broadcast_to(_sinks(4)[None, :, None], outcome.lse.shape)
    np.testing.assert_array_equal(outcome.lse, expected)


@pytest.mark.parametrize("name", [SOFTCAP, SINKS])
def test_rules_are_obeyed_or_refused(kit: Kit, name: str) -> None:
    """A rule that changes the output does; a backend that does not know it is not asked."""
    plan = kit.head()
    spec = replace(SPEC, dtype=kit.dtype(plan))
    given_: tuple[Any, Any] = (0.5, None) if name == SOFTCAP else (None, _sinks(4))
    problem = _with(spec, kit, *given_)
    if name not in dict(kit.capabilities.rules):
        with pytest.raises(UnsupportedError, match=name):
            kit.certify(problem, plan)
        return
    plain = kit.certify(spec.build(kit.home.send), plan)
    ruled = kit.certify(problem, plan)
    moved = kit.home.fetch(ruled.lse) - kit.home.fetch(plain.lse)
    assert np.abs(np.asarray(moved, np.float64)).max() > 1e-3
