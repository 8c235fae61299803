"""Plan: what was chosen survives saving, and a damaged file is refused in three lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_core.errors import ArgumentError, FileError, PlanError
from adaattn_core.formats import FORMATS
from adaattn_core.mask import Mask
from adaattn_core.plan import PLAN_VERSION, HeadPlan, Plan
from adaattn_core.policies import CalibratedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import (
    BlockSparse,
    Dense,
    Landmark,
    LowRank,
    ScoreSkip,
)

MANY = st.integers(1, 512)
BLOCKS = st.sets(st.integers(0, 2**31 - 1)).map(sorted).map(tuple)
STRUCTURE = st.one_of(
    st.just(Dense()),
    st.builds(ScoreSkip, lam=st.floats(1e-12, 0.9), tile_q=MANY, tile_kv=MANY),
    st.builds(LowRank, rank=MANY),
    st.builds(BlockSparse, tau=st.floats(0, 0.9), band=MANY, samples=MANY),
    st.builds(BlockSparse, blocks=st.lists(BLOCKS, max_size=4).map(tuple)),
    st.builds(Landmark, tau=st.floats(0, 0.9), samples=MANY, tail=st.integers(0, 512)),
)
HEAD = st.builds(
    HeadPlan,
    structure=STRUCTURE,
    qk=st.sampled_from(list(FORMATS)),
    pv=st.sampled_from(list(FORMATS)),
    scales=st.sampled_from(("tile", "token", "block")),
    smooth_k=st.booleans(),
    rounding=st.sampled_from(("nearest", "stochastic")),
    p_scale=st.floats(1.0, 448.0),
    flush_keys=st.integers(0, 1024),
    reason=st.text(max_size=20),
    cost_estimate=st.floats(0, 10),
    error_estimate=st.floats(0, 10),
)
PLAN = st.builds(
    Plan,
    heads=st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), HEAD, max_size=5),
    seed=st.integers(0, 2**60),
    policy=st.text(max_size=8),
    target=st.text(max_size=8),
    layer=st.text(max_size=8),
)


def _problem(heads: int = 2) -> AttentionProblem:
    x = np.zeros((1, heads, 4, 8), np.float32)
    return AttentionProblem.from_arrays(x, x, x, mask=Mask.causal())


@given(plan=PLAN)
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert hash(again) == hash(plan)


@given(plan=PLAN)
def test_equal_plans_hash_alike_in_any_order(plan: Plan) -> None:
    turned = Plan(
        dict(reversed(plan.heads.items())), plan.seed, plan.policy, plan.target, plan.layer
    )
    assert turned == plan
    assert hash(turned) == hash(plan)


def test_save_and_load(tmp_path: Path) -> None:
    head = HeadPlan(LowRank(3), "i8", "e4m3", reason="because", rounding="stochastic")
    plan = Plan.uniform(_problem(), head, seed=5, policy="fixed", target="cpu", layer="L0")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_saving_nowhere_leaves_nothing(tmp_path: Path) -> None:
    plan = Plan.uniform(_problem(), HeadPlan())
    with pytest.raises(FileError, match="a folder that exists"):
        plan.save(tmp_path / "missing" / "plan.json")
    assert not list(tmp_path.iterdir())


def _document(**changed: Any) -> dict[str, Any]:
    return Plan.uniform(_problem(1), HeadPlan()).to_json() | changed


def _with_head(**changed: Any) -> dict[str, Any]:
    document = _document()
    document["heads"][0] |= changed
    return document


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        _document(adaattn_plan=PLAN_VERSION + 1),
        {k: v for k, v in _document().items() if k != "seed"},
        _document(heads=3),
        _document(heads=[3]),
        _document(seed="x"),
        _with_head(qk="fp8"),
        _with_head(qk=8),
        _with_head(colour="red"),
        _with_head(scales="tensor"),
        _with_head(p_scale="448"),
        _with_head(p_scale=0.0),
        _with_head(flush_keys=-1),
        _with_head(flush_keys=True),
        _with_head(cost_estimate=None),
        _with_head(sequence="first"),
        _with_head(structure={"kind": "sparse"}),
        _with_head(structure={"kind": ["dense"]}),
        _with_head(structure={"kind": "low_rank", "rank": 0}),
        _with_head(structure={"kind": "low_rank", "depth": 3}),
        _with_head(structure={"kind": "score_skip", "lam": "small"}),
        _with_head(structure=None),
        _with_head(structure={"kind": "dense", "colour": "red"}),
        _with_head(structure={"kind": "low_rank"}),
        _with_head(structure=LowRank(3).to_json() | {"rank": 3.0}),
        _with_head(structure=LowRank(3).to_json() | {"rank": True}),
        _with_head(structure=ScoreSkip().to_json() | {"lam": float("nan")}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[0, 0]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[1, 0]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[-1]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[2**31]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[2**64]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [[0.5]]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": [0]}),
        _with_head(structure=BlockSparse().to_json() | {"blocks": {}}),
        _with_head(structure=BlockSparse().to_json() | {"band": 2**63}),
        _with_head(structure=Landmark().to_json() | {"pool": 2**20, "tile": 2**20}),
        _with_head(flush_keys=2**40),
        _with_head(p_scale=float("inf")),
        _with_head(p_scale=1e300),
        _with_head(p_scale=10**400),
        _with_head(error_estimate=float("nan")),
        _with_head(cost_estimate=-1.0),
        _with_head(smooth_k=1),
        _with_head(reason=None),
        _with_head(head=-1),
        _with_head(head="0"),
        _with_head(sequence=0.0),
        _with_head(sequence=True),
        _document(seed=-1),
        _document(seed=1.5),
        _document(seed=True),
        _document(seed=2**70),
        _document(layer=None),
        _document(policy=3),
        _document(adaattn_plan=True),
        _document(colour="red"),
        _document(heads=_document()["heads"] * 2),
    ],
)
def test_damaged_documents_are_refused(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(caught.value).count("\n") == 2


def test_plans_of_version_1_are_read_where_they_mean_the_same(tmp_path: Path) -> None:
    old = _document(adaattn_plan=1)
    assert Plan.from_json(old).to_json() == _document()
    old["heads"][0]["structure"] = ScoreSkip(lam=1e-3).to_json()
    with pytest.raises(PlanError, match="log-sum-exp") as caught:
        Plan.from_json(old)
    assert str(caught.value).count("\n") == 2
    with pytest.raises(PlanError):
        Plan.from_json(_with_head(structure=None) | {"adaattn_plan": 1})


def test_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    text = json.dumps(_document())
    path.write_text(text.replace('"seed": 0', '"seed": 0, "seed": 1'))
    with pytest.raises(PlanError, match="twice"):
        Plan.load(path)


NESTED = b'{"heads":' + b"[" * 100_000


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", NESTED])
def test_files_that_are_no_plan(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(path)
    with pytest.raises(PlanError, match="check the path"):
        Plan.load(tmp_path / "none.json")


def test_fits_exactly_its_heads() -> None:
    plan = Plan.uniform(_problem(2), HeadPlan())
    plan.check_fits(_problem(2))
    for other in (1, 3):
        with pytest.raises(PlanError, match=f"x {other} heads"):
            plan.check_fits(_problem(other))


def test_with_heads_replaces_some() -> None:
    plan = Plan.uniform(_problem(2), HeadPlan())
    wide = HeadPlan(qk="f64", pv="f64")
    changed = plan.with_heads({(0, 1): wide})
    assert (changed[0, 0], changed[0, 1]) == (HeadPlan(), wide)
    assert plan[0, 1] == HeadPlan()


def test_explain_names_every_head_and_why() -> None:
    heads = {
        (0, 0): HeadPlan(reason="qk_rounding"),
        (0, 1): HeadPlan(Landmark(), "bf16", "bf16"),
    }
    lines = Plan(heads, policy="budget", target="cpu", layer="L3").explain().splitlines()
    assert lines[0] == "plan by budget for cpu, layer L3"
    assert "qk_rounding" in lines[2]
    assert "landmark" in lines[3]
    assert lines[-1] == "in all: 1 x dense f32/f32, 1 x landmark bf16/bf16"


@pytest.mark.parametrize("fields", [{"qk": "half"}, {"pv": "fp8"}])
def test_formats_have_one_spelling(fields: dict[str, str]) -> None:
    with pytest.raises(ArgumentError):
        HeadPlan(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"structure": "dense"},
        {"structure": None},
        {"qk": ["f32"]},
        {"smooth_k": "no"},
        {"scales": None},
        {"p_scale": math.nan},
        {"p_scale": 0},
        {"flush_keys": 1.5},
        {"error_estimate": math.nan},
        {"cost_estimate": -1},
        {"reason": 5},
    ],
)
def test_head_plans_are_checked_when_made(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        HeadPlan(**fields)
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"heads": None},
        {"heads": {(0, 0): Dense()}},
        {"heads": {(0, -1): HeadPlan()}},
        {"heads": {(0, 0.0): HeadPlan()}},
        {"heads": {0: HeadPlan()}},
        {"seed": -1},
        {"seed": 0.5},
        {"policy": None},
        {"layer": 3},
    ],
)
def test_plans_are_checked_when_made(fields: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(**({"heads": {}} | fields))
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("blocks", [(), ((0,), (0,)), ((1,),), ((0, 5),)])
def test_given_blocks_fit_the_problem(blocks: Any) -> None:
    plan = Plan.uniform(_problem(1), HeadPlan(BlockSparse(blocks=blocks)))
    with pytest.raises(PlanError, match="query tiles"):
        plan.check_fits(_problem(1))
    Plan.uniform(_problem(1), HeadPlan(BlockSparse(blocks=((0,),)))).check_fits(_problem(1))


def _mutations(value: Any) -> st.SearchStrategy[Any]:
    other: list[Any] = [
        None,
        True,
        -1,
        2**31,
        2**64,
        0.5,
        math.nan,
        math.inf,
        "x",
        [],
        {},
        [[0, 0]],
    ]
    return st.sampled_from([v for v in other if type(v) is not type(value) or v != value])


@given(plan=PLAN.filter(lambda p: len(p.heads) > 0), data=st.data())
def test_whatever_loads_is_a_plan_that_saves_again(plan: Plan, data: st.DataObject) -> None:
    """Any one value of a plan file replaced: refused in three lines, or a whole plan."""
    document = json.loads(json.dumps(plan.to_json()))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(document)
    node, key = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    node[key] = data.draw(_mutations(node[key]))
    try:
        loaded = Plan.from_json(document)
    except PlanError as error:
        refused = str(error)
    else:
        refused = "1\n2\n3"
        assert Plan.from_json(json.loads(json.dumps(loaded.to_json()))) == loaded
    assert refused.count("\n") == 2


def test_calibrated_folders_hold_one_plan_per_layer(tmp_path: Path) -> None:
    plan = Plan.uniform(_problem(), HeadPlan(), layer="L0")
    for name in ("a", "b"):
        plan.save(tmp_path / f"{name}.json")
    with pytest.raises(PlanError, match="one plan for each layer"):
        CalibratedPolicy(tmp_path)


@pytest.mark.parametrize("plans", [{"L0": HeadPlan()}, {0: Plan({})}, [Plan({})]])
def test_calibrated_plans_are_plans_by_name(plans: Any) -> None:
    with pytest.raises(PlanError, match="layer names"):
        CalibratedPolicy(plans=plans)
