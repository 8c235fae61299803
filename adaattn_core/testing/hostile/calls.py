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
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import Policy
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_core.policies.entropy import EntropyPolicy
from adaattn_core.policies.fixed import ExactPolicy, FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.structure import structure_from_json
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.hostile.choices import choices
from adaattn_core.testing.hostile.problems import HostileArrays, HostileProblem

Fields = dict[str, Any]

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
        dictionary that ``Structure.to_json`` writes. Blocks may be given as ``{"seed": s,
        "share": x}``: of every query tile of the problem, that share of the key blocks.
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
        plan = Plan.uniform(checked, self._head_plan(problem), seed=self.seed(problem))
        return Plan.from_json(json.loads(json.dumps(plan.to_json()))) if self.saved else plan

    def _head_plan(self, problem: HostileProblem) -> HeadPlan:
        return HeadPlan(**self._head_fields(problem))

    def _head_fields(self, problem: HostileProblem) -> Fields:
        """Fields of the head plan, with the structure itself."""
        body = dict(self.head.get("structure", {"kind": "dense"}))
        if isinstance(body.get("blocks"), dict):
            body["blocks"] = _some_blocks(problem, body)
        return self.head | {"structure": structure_from_json(body, partial=True)}

    def _policy(self, problem: HostileProblem) -> Policy | None:
        if self.how == "fixed":
            return FixedPolicy(**self._head_fields(problem))
        if self.how == "calibrated":
            head = self._head_plan(problem)
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
        home: ArrayHome = ArrayHome(),  # noqa: B008 (frozen)
        **replaced: Any,
    ) -> AttentionResult:
        """Call attention with arrays put into `home`; `replaced` arguments win.

        Output and lse come back as NumPy's arrays.

        Raises
        ------
        AdaAttnError
            If anything is refused; every other exception is a finding.
        """
        budget = None if self.budget is None else ErrorBudget(**self.budget)
        qkv = [arrays.query, arrays.key, arrays.value]
        if problem.layout == "bshd":
            qkv = [x.transpose(0, 2, 1, 3) for x in qkv]
        sinks = problem.sinks_of_heads()
        arguments: dict[str, Any] = {
            "mask": home.send_mask(arrays.mask),
            "scale": problem.scale,
            "softcap": problem.softcap,
            "sinks": None if sinks is None else home.send(sinks),
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
        result = attention(*(home.send(x) for x in qkv), **(arguments | replaced))
        if home.namespace is None:
            return result
        out = home.fetch(result.out).astype(arrays.query.dtype)  # bf16 comes back widened
        return replace(result, out=out, lse=home.fetch(result.lse))


def _some_blocks(problem: HostileProblem, body: Fields) -> list[list[int]]:
    wish = body["blocks"]
    rng = np.random.default_rng(wish["seed"])
    sizes = (problem.len_q, body["tile_q"]), (problem.len_kv, body["tile_kv"])
    keep = rng.random([-(-length // tile) for length, tile in sizes]) < wish["share"]
    return [np.flatnonzero(row).tolist() for row in keep]


def out_of(result: AttentionResult, problem: HostileProblem) -> Any:
    """Output of a call in (batch, heads, len, dim) order."""
    out = np.asarray(result.out)
    return out.transpose(0, 2, 1, 3) if problem.layout == "bshd" else out


# -- strategies -------------------------------------------------------------------------------
_SIZES = (1, 2, 3, 4, 8, 16, 64, 128)
_STRUCTURES: dict[str, st.SearchStrategy[Fields]] = {
    "dense": st.just({}),
    "score_skip": choices(
        lam=(1e-3, 0.1, 0.9, 1e-6, 1e-300, 5e-324, 1 - 2**-53), tile_q=_SIZES, tile_kv=_SIZES
    ),
    "low_rank": choices(rank=(1, 2, 3, 4, 8, 16, 10**6)),
    "block_sparse": choices(
        tau=(0.0, 0.05, 0.5, 0.99),
        band=(0, 1, 4, 16, 10**9),
        tile_q=_SIZES,
        tile_kv=_SIZES,
        samples=(1, 4, 64),
        group=(1, 2, 16),
        given=("", "some", "", "some", "some", "odd"),
        share=(0.5, 0.0, 0.9, 1.0),
        seed=tuple(range(10)),
    ),
    "landmark": choices(
        tau=(0.05, 0.0, 0.3, 0.9),
        pool=(0, 1, 2, 4, 8),
        fitted=(True, False),
        tile=(1, 2, 4),
        band=(0, 1, 2, 8),
        group=(1, 2, 4, 64),
        clusters=(1, 2, 4),
        samples=(1, 2, 4, 16),
        screen_rank=(0, 1, 4, 16, 64),
        screen_theta=(0.02, 0.5, 1e-6),
        tail=(0, 1, 4, 10**9),
    ),
}
_FORMATS = (
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
_HEADS = choices(
    kind=tuple(_STRUCTURES),
    formats=_FORMATS,
    scales=("tile", "token", "block"),
    smooth_k=(True, False),
    rounding=("nearest", "stochastic"),
    p_scale=(448.0, 1.0, 2.0**-10),
    flush_keys=(256, 128, 1, 32, 0),
    odd=(False,) * 19 + (True,),
)


@st.composite
def structures(draw: st.DrawFn, kind: str, *, odd: bool = False) -> Fields:
    """Draw a structure of small sizes, as the dictionary that a saved plan holds.

    Parameters
    ----------
    kind : str
        Of the structure.
    odd : bool
        Whether block lists may be out of order, doubled, out of range or too few.
    """
    body: Fields = {"kind": kind} | draw(_STRUCTURES[kind])
    if kind == "block_sparse":
        body["group"] *= body["tile_q"]
        given, share, seed = (body.pop(name) for name in ("given", "share", "seed"))
        if given == "odd" and odd:
            body["blocks"] = draw(_odd_blocks())
        elif given:
            body["blocks"] = {"seed": seed, "share": share}
    elif kind == "landmark":
        step = body["pool"] or 1
        body["tile"] *= step
        body["band"] *= step
        body["group"] *= body["tile"]
        body["samples"] *= body["clusters"]
    return body


@st.composite
def _odd_blocks(draw: st.DrawFn) -> list[list[int]]:
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        row = draw(st.lists(st.integers(0, 12), max_size=6))
        if draw(st.booleans()):
            row = sorted(set(row))
        elif draw(st.booleans()):
            row += draw(st.sampled_from(((-1,), (2**31,), (2**63,), (10**30,), (0, 0))))
        rows.append(row)
    return rows


@st.composite
def head_plans(draw: st.DrawFn, *, odd: bool = False) -> Fields:
    """Draw the fields of a head plan; see `structures`."""
    chosen = draw(_HEADS)
    qk, pv = chosen["formats"]
    structure = draw(structures(chosen["kind"], odd=odd))
    head: Fields = {"structure": structure, "qk": qk, "pv": pv}
    names: tuple[str, ...] = ()
    if get_format(qk).is_quantised:
        names += ("scales", "smooth_k", "rounding")
    if get_format(pv).is_quantised:
        names += ("p_scale", "flush_keys")
    head |= {name: chosen[name] for name in names}
    if odd and chosen["odd"]:
        head["p_scale"] = 1e30
    return head


def budgets(guarantees: Sequence[str] = GUARANTEES) -> st.SearchStrategy[Fields]:
    """Draw a budget; shares and confidences low enough for samples of a few rows too."""

    def allowed(chosen: Fields) -> Fields:
        whole, sure = (chosen.pop(name) for name in ("whole", "sure"))
        if whole and chosen["guarantee"] != "sampled":
            chosen["rows"] = 1.0
        if sure and chosen["guarantee"] == "worst_case":
            chosen["confidence"] = 1.0
        return chosen

    return choices(
        guarantee=guarantees,
        rel=(0.1, 1e-3, 1.0, 1e-6, 1e-12, 100.0, 1e300),
        rows=(0.5, 0.95, 0.2, 0.8),
        confidence=(0.5, 0.95, 0.8),
        on_violation=("escalate", "report", "report", "raise"),
        whole=(False, True),
        sure=(False, True),
    ).map(allowed)


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


def hostile_calls(
    *,
    hows: Sequence[str] = ("exact", "budget", "entropy", "fixed", "calibrated", "frozen"),
    guarantees: Sequence[str] = GUARANTEES,
    odd: bool = True,
    no_budget: bool = True,
) -> st.SearchStrategy[HostileCall]:
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
    plain = choices(
        how=hows,
        target=(None, None, "sm90", "sm80"),
        saved=(False, True),
        named=(False, True),
        free=(False, False, False, True) if no_budget else (False,),
        budget=_BUDGET_OPTIONS,
        entropy=_ENTROPY_OPTIONS,
    )
    heads, kept = head_plans(odd=odd), budgets(guarantees)

    @st.composite
    def calls(draw: st.DrawFn) -> HostileCall:
        chosen = draw(plain)
        how = chosen["how"]
        options = {"named": chosen["named"]} if how == "exact" else chosen.get(how, {})
        return HostileCall(
            how=how,
            head=draw(heads) if how in ("fixed", "calibrated", "frozen") else {},
            options=options,
            budget=None if chosen["free"] else draw(kept),
            target=chosen["target"],
            saved=how == "frozen" and chosen["saved"],
        )

    return calls()
