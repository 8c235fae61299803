"""Hostile calls: plans of every structure, policies and budgets, as words and numbers.

Nothing is built while drawing, because an odd plan may be refused: `HostileCall.run` builds
everything inside the call, where a documented error is an answer like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from adaattn_core.api import attention
from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import Policy
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_core.policies.entropy import EntropyPolicy
from adaattn_core.policies.fixed import ExactPolicy, FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.structure import structure_from_json
from adaattn_core.testing.hostile.problems import HostileArrays, HostileProblem

Fields = dict[str, Any]

FORMATS_8BIT, FORMATS_WIDE = ("i8", "e4m3"), ("f32", "f64", "f16", "bf16", "tf32")
GUARANTEES = ("sampled", "worst_case", "probabilistic")


@dataclass(frozen=True, slots=True)
class HostileCall:
    """How attention is called.

    Attributes
    ----------
    how : {"exact", "budget", "entropy", "fixed", "calibrated", "frozen"}
        Which policy decides; "frozen" hands in a plan.
    head : dict
        Fields of the head plan of "fixed", "calibrated" and "frozen", its structure as the
        dictionary that ``Structure.to_json`` writes.
    options : dict
        Fields of the policy.
    budget : dict or None
        Fields of the `ErrorBudget`.
    target : str or None
    saved : bool
        Whether the frozen plan goes through its saved form.
    """

    how: str = "exact"
    head: Fields = field(default_factory=dict)
    options: Fields = field(default_factory=dict)
    budget: Fields | None = None
    target: str | None = None
    saved: bool = False

    def seed(self, problem: HostileProblem) -> int:
        """Return a seed that no drawing of the spec could aim at, the same every time.

        What hidden keys hold is left out: it may change nothing.
        """
        text = repr((replace(problem, hidden="same"), self)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "little")

    def plan(self, problem: HostileProblem, arrays: HostileArrays) -> Plan:
        """Return the frozen plan: the same for every head."""
        checked = AttentionProblem.from_arrays(
            arrays.query, arrays.key, arrays.value, mask=arrays.mask, scale=problem.scale
        )
        plan = Plan.uniform(checked, self._head_plan(), seed=self.seed(problem))
        return Plan.from_json(json.loads(json.dumps(plan.to_json()))) if self.saved else plan

    def _head_plan(self) -> HeadPlan:
        fields = dict(self.head)
        structure = structure_from_json(dict(fields.pop("structure", {"kind": "dense"})))
        return HeadPlan(structure=structure, **fields)

    def _policy(self, problem: HostileProblem) -> Policy | None:
        if self.how == "fixed":
            fields = dict(self.head)
            structure = structure_from_json(dict(fields.pop("structure", {"kind": "dense"})))
            return FixedPolicy(structure, **fields)
        if self.how == "calibrated":
            head = self._head_plan()
            heads = {(0, h): head for h in range(problem.heads_q)}
            return CalibratedPolicy(plans={"": Plan(heads=heads)})
        if self.how == "budget":
            return BudgetPolicy(**self.options)
        if self.how == "entropy":
            return EntropyPolicy(**self.options)
        return ExactPolicy() if self.how == "exact" and self.options.get("named") else None

    def run(
        self,
        problem: HostileProblem,
        arrays: HostileArrays,
        backend: Backend | str = "numpy",
        **replaced: Any,
    ) -> AttentionResult:
        """Call attention; `replaced` arguments win.

        Raises
        ------
        AdaAttnError
            If anything is refused; every other exception is a finding.
        """
        budget = None if self.budget is None else ErrorBudget(**self.budget)
        qkv = [arrays.query, arrays.key, arrays.value]
        if problem.layout == "bshd":
            qkv = [x.transpose(0, 2, 1, 3) for x in qkv]
        arguments: dict[str, Any] = {
            "mask": arrays.mask,
            "scale": problem.scale,
            "budget": budget,
            "target": self.target,
            "layout": problem.layout,
            "seed": self.seed(problem),
            "backend": backend,
        }
        if self.how == "frozen":
            arguments["plan"] = self.plan(problem, arrays)
        else:
            arguments["policy"] = self._policy(problem)
        return attention(*qkv, **(arguments | replaced))


def out_of(result: AttentionResult, problem: HostileProblem) -> Any:
    """Output of a call in (batch, heads, len, dim) order."""
    out = np.asarray(result.out)
    return out.transpose(0, 2, 1, 3) if problem.layout == "bshd" else out


# -- strategies -------------------------------------------------------------------------------
@st.composite
def structures(draw: st.DrawFn, *, odd: bool = False) -> Fields:
    """Draw a structure of small sizes, as the dictionary that a saved plan holds.

    Parameters
    ----------
    odd : bool
        Whether block lists may be out of order, doubled, out of range or too few, and sizes
        may be such that the plan is refused.
    """
    kind = draw(
        st.sampled_from(("dense", "score_skip", "low_rank", "block_sparse", "landmark"))
    )
    if kind == "score_skip":
        return {
            "kind": kind,
            "lam": draw(st.sampled_from((1e-3, 0.1, 0.9, 1e-6, 1e-300, 5e-324, 1 - 2**-53))),
            "tile_q": draw(_SIZES),
            "tile_kv": draw(_SIZES),
        }
    if kind == "low_rank":
        return {"kind": kind, "rank": draw(st.sampled_from((1, 2, 3, 4, 8, 16, 10**6)))}
    if kind == "block_sparse":
        tile_q = draw(_SIZES)
        body = {
            "kind": kind,
            "tau": draw(st.sampled_from((0.0, 0.05, 0.5, 0.99))),
            "band": draw(st.sampled_from((0, 1, 4, 16, 10**12))),
            "tile_q": tile_q,
            "tile_kv": draw(_SIZES),
            "samples": draw(st.sampled_from((1, 4, 64))),
            "group": tile_q * draw(st.sampled_from((1, 2, 16))),
        }
        if draw(st.booleans()):
            body["blocks"] = draw(_blocks(odd))
        return body
    if kind == "landmark":
        pool = draw(st.sampled_from((0, 1, 2, 4, 8)))
        tile = (pool or 1) * draw(st.sampled_from((1, 2, 4)))
        clusters = draw(st.sampled_from((1, 2, 4)))
        return {
            "kind": kind,
            "tau": draw(st.sampled_from((0.05, 0.0, 0.3, 0.9))),
            "band": (pool or 1) * draw(st.sampled_from((0, 1, 2, 8))),
            "group": tile * draw(st.sampled_from((1, 2, 4, 64))),
            "clusters": clusters,
            "samples": clusters * draw(st.sampled_from((1, 2, 4, 16))),
            "pool": pool,
            "tile": tile,
            "screen_rank": draw(st.sampled_from((0, 1, 4, 16, 64))),
            "screen_theta": draw(st.sampled_from((0.02, 0.5, 1e-6))),
            "tail": draw(st.sampled_from((0, 1, 4, 10**9))),
        }
    return {"kind": kind}


_SIZES = st.sampled_from((1, 2, 3, 4, 8, 16, 64, 128))


@st.composite
def _blocks(draw: st.DrawFn, odd: bool) -> list[list[int]]:
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        row = draw(st.lists(st.integers(0, 12), max_size=6))
        if not odd or draw(st.booleans()):
            row = sorted(set(row))
        elif draw(st.booleans()):
            row += draw(st.sampled_from(((-1,), (2**31,), (2**63,), (10**30,), (0, 0))))
        rows.append(row)
    return rows


@st.composite
def head_plans(draw: st.DrawFn, *, odd: bool = False) -> Fields:
    """Draw the fields of a head plan; see `structures`."""
    qk, pv = draw(_FORMATS)
    head = {"structure": draw(structures(odd=odd)), "qk": qk, "pv": pv}
    if qk in FORMATS_8BIT:
        head["scales"] = draw(st.sampled_from(("token", "block")))
        head["smooth_k"] = draw(st.sampled_from((True, False)))
        head["rounding"] = draw(st.sampled_from(("nearest", "stochastic")))
    if pv in FORMATS_8BIT:
        top = 448.0 if pv == "e4m3" else 127.0
        head["p_scale"] = draw(st.sampled_from((top, 1.0, 2.0**-10, *((1e30,) if odd else ()))))
        head["flush_keys"] = draw(st.sampled_from((128, 1, 32, 0) if odd else (128, 1, 32)))
    return head


_FORMATS = st.sampled_from(
    (
        ("f32", "f32"),
        ("f64", "f64"),
        ("f32", "f32"),
        ("f16", "f16"),
        ("bf16", "bf16"),
        ("tf32", "tf32"),
        ("i8", "f16"),
        ("i8", "e4m3"),
        ("e4m3", "e4m3"),
        ("i8", "i8"),
        ("i8", "bf16"),
        ("f32", "e4m3"),
        ("f16", "i8"),
    )
)


@st.composite
def budgets(draw: st.DrawFn, guarantees: Sequence[str] = GUARANTEES) -> Fields:
    """Draw a budget; shares and confidences low enough for samples of a few rows too."""
    guarantee = draw(st.sampled_from(guarantees))
    sampled = guarantee == "sampled"
    whole = not sampled and draw(st.booleans())
    sure = guarantee == "worst_case" and draw(st.booleans())
    return {
        "rel": draw(st.sampled_from((0.1, 1e-3, 1.0, 1e-6, 1e-12, 100.0, 1e300))),
        "rows": 1.0 if whole else draw(st.sampled_from((0.5, 0.95, 0.2, 0.8))),
        "confidence": 1.0 if sure else draw(st.sampled_from((0.5, 0.95, 0.8))),
        "guarantee": guarantee,
        "on_violation": draw(st.sampled_from(("escalate", "report", "report", "raise"))),
    }


@st.composite
def hostile_calls(
    draw: st.DrawFn,
    *,
    hows: Sequence[str] = ("exact", "budget", "entropy", "fixed", "calibrated", "frozen"),
    guarantees: Sequence[str] = GUARANTEES,
    odd: bool = True,
    no_budget: bool = True,
) -> HostileCall:
    """Draw a call.

    Parameters
    ----------
    hows : sequence of str
        Who decides; see `HostileCall`.
    guarantees : sequence of str
        Guarantees to choose from.
    odd : bool
        Whether plans may be such that they must be refused.
    no_budget : bool
        Whether there may be no budget.
    """
    how = draw(st.sampled_from(hows))
    head: Fields = {}
    options: Fields = {}
    if how in ("fixed", "calibrated", "frozen"):
        head = draw(head_plans(odd=odd))
    elif how == "budget":
        options = draw(st.sampled_from(_BUDGET_OPTIONS))
    elif how == "entropy":
        options = draw(st.sampled_from(_ENTROPY_OPTIONS))
    elif how == "exact":
        options = {"named": draw(st.booleans())}
    budget = draw(budgets(guarantees))
    if no_budget and draw(st.integers(0, 3 if how != "exact" else 1)) == 0:
        budget = {}
    return HostileCall(
        how=how,
        head=head,
        options=options,
        budget=budget or None,
        target=draw(st.sampled_from((None, None, "sm90", "sm80"))),
        saved=how == "frozen" and draw(st.booleans()),
    )


_BUDGET_OPTIONS: tuple[Fields, ...] = (
    {},
    {"worthwhile": 1e9},
    {"worthwhile": 1e9, "margin": 1e3, "diffuse": 2.0, "low_rank_participation": 2.0},
    {"worthwhile": 1e9, "taus": (0.9, 0.5), "lams": (0.9, 0.1), "margin": 1.0},
)
_ENTROPY_OPTIONS: tuple[Fields, ...] = (
    {},
    {"least_len": 1},
    {"least_len": 1, "entropy_diffuse": 2.0, "landmark_share": 2.0, "rank_participation": 0.0},
    {"least_len": 1, "entropy_diffuse": 2.0, "rank_participation": 9.0, "score_8bit": 1e30},
    {"least_len": 1, "entropy_diffuse": 9.0, "landmark_share": 0.0, "rank_participation": 0.0},
)
