"""The backend contract: claims are true, refusals are loud, and nothing else is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.backend import Backend, Forwards, Measures
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import PlanError, UnsupportedError
from adaattn_core.formats import FORMATS
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.stats import MeasureRequest
from adaattn_core.structure import STRUCTURES, Dense
from adaattn_core.testing.kit import Kit, Outcome
from adaattn_core.testing.strategies import MASK_KINDS, MaskSpec, ProblemSpec

_EXAMPLE_MASKS = {
    "causal": MaskSpec(window=(None, 0), alignment="top_left"),
    "window": MaskSpec(window=(8, 8), alignment="bottom_right"),
    "lengths": MaskSpec(lengths="lengths"),
    "ragged": MaskSpec(lengths="ragged"),
    "boolean": MaskSpec(arrays=("boolean",)),
    "additive": MaskSpec(arrays=("additive",)),
}


def _spec(kit: Kit, **changed: Any) -> ProblemSpec:
    body: dict[str, Any] = {"batch": 2, "heads_kv": 2, "group": 2, "len_q": 48, "len_kv": 64}
    body |= {"dim_qk": 64, "dim_v": 64, "dtype": kit.dtype(kit.head())}
    return ProblemSpec(**(body | changed))


def _request() -> MeasureRequest:
    return MeasureRequest(
        rows=0.95,
        structures=(Dense(),),
        enough_error=0.0,
        formats=(("bf16", "bf16"),),
        spectrum=False,
        seed=0,
    )


def _assert_bitwise(first: Outcome, second: Outcome) -> None:
    np.testing.assert_array_equal(first.out, second.out)
    np.testing.assert_array_equal(first.lse, second.lse)


def _assert_refused(kit: Kit, problem: AttentionProblem, plan: HeadPlan, what: str) -> None:
    try:
        kit.run(problem, plan)
    except UnsupportedError:
        return
    pytest.fail(f"{what} is not claimed, but runs")


def test_capabilities_use_the_project_names(kit: Kit) -> None:
    """Formats, structures and masks are spelled as everywhere; dense is always there."""
    can = kit.capabilities
    assert isinstance(kit.backend, Backend)
    assert set(can.qk_formats) <= set(FORMATS)
    assert set(can.pv_formats) <= set(FORMATS)
    assert set(can.emulated_formats) <= set(can.qk_formats) | set(can.pv_formats)
    assert set(can.structures) <= set(STRUCTURES)
    assert "dense" in can.structures
    assert set(can.masks) <= set(MASK_KINDS)
    assert can.array_devices


def test_provenance_says_what_computed(kit: Kit) -> None:
    """Provenance is words about words, and not empty."""
    facts = kit.backend.provenance()
    assert facts
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in facts.items())


def test_result_has_the_shape_and_kind_of_the_input(kit: Kit) -> None:
    """Output in the query's library and dtype, lse float32, facts for every head."""
    plan = kit.head()
    problem = _spec(kit).build(kit.home.send)
    result = kit.certify(problem, plan)
    assert type(result.out) is type(problem.query)
    assert result.out.dtype == problem.query.dtype
    assert tuple(result.out.shape) == (2, 4, 48, 64)
    assert str(result.lse.dtype).endswith("float32")
    assert tuple(result.lse.shape) == (2, 4, 48)
    assert set(result.facts) == set(problem.heads())
    assert all(0 <= f.share <= 1 for f in result.facts.values())


@pytest.mark.parametrize("mask", MASK_KINDS)
def test_masks_are_taken_or_refused(kit: Kit, mask: str) -> None:
    """A mask that is not claimed raises UnsupportedError; a claimed one runs."""
    plan = kit.head()
    problem = _spec(kit, mask=_EXAMPLE_MASKS[mask]).build(kit.home.send)
    if mask in kit.capabilities.masks:
        kit.run(problem, plan)
    else:
        _assert_refused(kit, problem, plan, f"mask {mask}")


@pytest.mark.parametrize("operand", ["qk", "pv"])
def test_formats_not_claimed_are_refused(kit: Kit, operand: str) -> None:
    """A format that is not claimed raises UnsupportedError, never a silent substitute."""
    unclaimed = set(FORMATS) - set(getattr(kit.capabilities, f"{operand}_formats"))
    if not unclaimed:
        pytest.skip(f"backend {kit.name} offers every {operand} format: nothing to refuse")
    problem = _spec(kit).build(kit.home.send)
    for name in sorted(unclaimed):
        plan = replace(kit.head(), **{operand: name})  # type: ignore[arg-type]
        _assert_refused(kit, problem, plan, f"{operand} format {name}")


def test_structures_not_claimed_are_refused(kit: Kit) -> None:
    """A structure that is not claimed raises UnsupportedError."""
    unclaimed = set(STRUCTURES) - set(kit.capabilities.structures)
    if not unclaimed:
        pytest.skip(f"backend {kit.name} offers every structure: nothing to refuse")
    problem = _spec(kit).build(kit.home.send)
    for kind in sorted(unclaimed):
        plan = kit.head(structure=STRUCTURES[kind]())
        _assert_refused(kit, problem, plan, f"structure {kind}")


def test_optional_protocols_are_whole(kit: Kit) -> None:
    """Who measures compares rows too: alone, `measure` would never be called."""
    assert isinstance(kit.backend, Measures) or not hasattr(kit.backend, "measure")


def test_the_short_way_is_the_exact_plan(kit: Kit) -> None:
    """What ``forward`` returns is what the front door returns without a budget, bit for bit."""
    if not isinstance(kit.backend, Forwards):
        pytest.skip(f"backend {kit.name} has no short way (forward)")
    problem = _spec(kit, mask=_EXAMPLE_MASKS["causal"]).build(kit.home.send)
    arrays = problem.query, problem.key, problem.value
    short = kit.backend.forward(*arrays, mask=problem.mask, scale=problem.scale)
    long = kit.attend(problem)
    for mine, theirs in zip(short, (long.out, long.lse), strict=True):
        assert type(mine) is type(theirs)
        np.testing.assert_array_equal(kit.home.fetch(mine), kit.home.fetch(theirs))


def test_a_plan_for_another_problem_is_refused(kit: Kit) -> None:
    """A plan that speaks of other heads raises PlanError at the front door."""
    problem = _spec(kit).build(kit.home.send)
    other = _spec(kit, batch=1).build(kit.home.send)
    plan = Plan.uniform(other, kit.head())
    with pytest.raises(PlanError):
        kit.attend(problem, plan=plan)


def test_two_runs_are_equal(kit: Kit) -> None:
    """The same plan on the same problem gives the same bits."""
    problem = _spec(kit).build(kit.home.send)
    plan = kit.head()
    first = kit.run(problem, plan)
    for _ in range(3):
        _assert_bitwise(first, kit.run(problem, plan))


@given(data=st.data())
def test_inputs_stay_as_they_were(kit: Kit, data: st.DataObject) -> None:
    """No run writes into query, key, value or mask."""
    plan = kit.head()
    spec = data.draw(kit.specs(plan))
    problem = spec.build(kit.home.send)
    before = _copies(kit, problem)
    kit.certify(problem, plan)
    for name, array in _copies(kit, problem).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def _copies(kit: Kit, problem: AttentionProblem) -> dict[str, np.ndarray]:
    arrays = {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "allowed": problem.mask.allowed,
        "bias": problem.mask.bias,
    }
    return {n: kit.home.fetch(x).astype(np.float64) for n, x in arrays.items() if x is not None}


def test_running_some_heads_again_changes_nothing(kit: Kit) -> None:
    """Recomputing some heads into a result leaves every bit where it was."""
    problem = _spec(kit).build(kit.home.send)
    plan = Plan.uniform(problem, kit.head())
    first = kit.outcome(kit.backend.run(problem, plan))
    again = kit.backend.run(problem, plan, heads=[(0, 1), (1, 3)], into=first.raw)
    _assert_bitwise(first, kit.outcome(again))
    assert set(again.facts) == set(problem.heads())


def test_running_some_heads_differently_touches_only_them(kit: Kit) -> None:
    """An escalation rewrites the heads it names and no others."""
    plans = [kit.head(qk=f) for f in kit.capabilities.qk_formats if f in ("f64", "f32", "bf16")]
    if len(plans) < 2:
        pytest.skip(f"backend {kit.name} offers only one of the qk formats f64, f32, bf16")
    problem = _spec(kit).build(kit.home.send)
    narrow, wide = plans[-1], plans[0]
    first = kit.outcome(kit.backend.run(problem, Plan.uniform(problem, narrow)))
    changed = Plan.uniform(problem, narrow).with_heads({(1, 2): wide})
    second = kit.outcome(kit.backend.run(problem, changed, heads=[(1, 2)], into=first.raw))
    whole = kit.run(problem, wide)
    for index in problem.heads():
        expected = whole if index == (1, 2) else first
        np.testing.assert_array_equal(second.out[index], expected.out[index])


def test_workspace_changes_nothing(kit: Kit) -> None:
    """A run with the workspace of `measure` equals a run without it, bit for bit."""
    measuring = kit.measuring()
    problem = _spec(kit).build(kit.home.send)
    plan = Plan.uniform(problem, kit.head())
    _, workspace = measuring.measure(problem, _request())
    with_it = kit.backend.run(problem, plan, workspace=workspace)
    _assert_bitwise(kit.outcome(with_it), kit.outcome(kit.backend.run(problem, plan)))


@pytest.mark.parametrize("guarantee", [None, "sampled", "probabilistic", "worst_case"])
def test_replay_of_a_saved_plan(kit: Kit, guarantee: str | None, tmp_path: Path) -> None:
    """Saving, loading and running the plan of a result reproduces it bit for bit."""
    budget = None
    if guarantee is not None:
        kit.sampling()
        confidence = 1.0 if guarantee == "worst_case" else 0.9
        rows = 1.0 if guarantee == "worst_case" else 0.9
        budget = ErrorBudget(0.2, rows, confidence, guarantee)  # type: ignore[arg-type]
    problem = _spec(kit, len_q=192, len_kv=192).build(kit.home.send)
    result = kit.attend(problem, budget=budget, seed=7)
    result.plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == result.plan
    checked = None if budget is None else replace(budget, on_violation="report")
    replayed = kit.attend(problem, plan=loaded, budget=checked)
    for name in ("out", "lse"):
        first, second = (kit.home.fetch(getattr(r, name)) for r in (result, replayed))
        np.testing.assert_array_equal(first, second, err_msg=name)
