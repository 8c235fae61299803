"""DecisionTable: a policy compiled to numbers, and the one rule that chooses by them.

A device cannot call Python. A policy whose rule fits this table compiles to it, and a device
function (``adaattn/plan/decide.cuh``) applies it to what was measured on the device;
`decide_table` and `escalate_table` are the same rule in NumPy. Both compute in float32, in the
same order of operations, and are tested equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.errors import ArgumentError
from adaattn_core.formats import FORMATS
from adaattn_core.plan import HeadPlan
from adaattn_core.structure import STRUCTURES, Landmark, LowRank, ScoreSkip, Structure

MAX_CANDIDATES = 12
"""Candidates that a table holds at most."""
FALLBACK = -1
"""Choice that stands for the dense fallback."""
NOTHING, NONFINITE, OUTSIDE, INACCURATE, COSTLY, CHOSEN = range(6)
"""What became of a candidate, from the least to the most successful: there was none; a number
that it needs is negative, NaN or infinite; the head lies outside its limits; it is not accurate
enough; it is not cheap enough; it was chosen. A choice of the fallback carries the largest of
its candidates' outcomes."""
KINDS: dict[str, int] = {kind: code for code, kind in enumerate(STRUCTURES)}
"""Code of each kind of structure in a table."""
FORMAT_CODES: dict[str, int] = {name: code for code, name in enumerate(FORMATS)}
"""Code of each format in a table."""

CANDIDATE = np.dtype(
    [
        ("kind", "<i4"),
        ("qk", "<i4"),
        ("pv", "<i4"),
        ("knob", "<f4"),
        ("fixed", "<f4"),
        ("slope", "<f4"),
        ("entropy_below", "<f4"),
        ("saturation_most", "<f4"),
        ("score_most", "<f4"),
        ("share_most", "<f4"),
    ]
)
"""One candidate: codes, the structure's knob (tau, lam or rank), predicted cost
``fixed + slope * share`` of the dense head's, and the limits within which it is considered."""
TABLE = np.dtype(
    [
        ("count", "<i4"),
        ("aim", "<f4"),
        ("escalation_aim", "<f4"),
        ("worthwhile", "<f4"),
        ("candidates", CANDIDATE, (MAX_CANDIDATES,)),
    ]
)
"""Byte for byte ``struct DecisionTable`` of decide.cuh."""
HEAD_MEASURES = np.dtype(
    [
        ("entropy_relative", "<f4"),
        ("saturation", "<f4"),
        ("score_max_abs", "<f4"),
        ("output_rms", "<f4"),
        ("share", "<f4", (MAX_CANDIDATES,)),
        ("error", "<f4", (MAX_CANDIDATES,)),
    ]
)
"""What is measured of a head (`HeadStats` has the definitions), and of every candidate on it:
share of the visible scores, and row error at the budget's quantile relative to ``output_rms``.
0 where a table does not ask for it. ``struct HeadMeasures`` of decide.cuh."""
CHOICE = np.dtype([("candidate", "<i4"), ("outcome", "<i4"), ("cost", "<f4"), ("error", "<f4")])
"""What was chosen for a head: a candidate or `FALLBACK`, what decided, predicted cost relative
to dense, predicted error. ``struct Choice`` of decide.cuh."""

FLOAT_MAX = np.float32(np.finfo(np.float32).max)
_FACTS = ("entropy_relative", "saturation", "score_max_abs", "output_rms")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A head plan that a table may choose, its predicted cost, and limits on the head.

    Attributes
    ----------
    plan : HeadPlan
    fixed, slope : float
        Cost relative to the dense head's is ``fixed + slope * share``; `fixed` holds the probe
        and the certificate. Both finite and at least 0.
    entropy_below, saturation_most, score_most, share_most : float
        Considered where the relative entropy lies below, and saturation, largest score and
        share of scores kept are at most these. Inf = whatever they are.
    """

    plan: HeadPlan
    fixed: float
    slope: float
    entropy_below: float = np.inf
    saturation_most: float = np.inf
    score_most: float = np.inf
    share_most: float = np.inf


@dataclass(frozen=True, slots=True)
class DecisionTable:
    """What a policy compiles to, for heads of one shape.

    Attributes
    ----------
    candidates : tuple of Candidate
        From the safest to the cheapest: of two that cost the same the earlier is chosen.
        None = the fallback serves every head, and nothing need be measured.
    fallback : HeadPlan
        Dense, at the inputs' own precision; its `cost_estimate` is what a cost of 1 means.
    aim : float
        Largest predicted row error of a choice.
    escalation_aim : float
        Largest predicted row error of an escalation, after correction by how far the certified
        error of the failed candidate lay above its predicted one. At most 0: escalate straight
        to the fallback.
    worthwhile : float
        A candidate is chosen only if its cost is below this.
    measured : bool
        Whether anything that `HEAD_MEASURES` names must be measured; otherwise zeros do.
    priced : bool
        Whether costs are predicted times; otherwise they only put candidates in order.
    narrow : HeadPlan or None
        Dense in 8 bits: heads that no candidate serves run so first, and those whose
        certificates miss the budget run the fallback after it. What it errs by is not
        predicted head by head: every head is certified anyway.
    narrow_entropy : float
        Where heads are measured, those of a smaller relative entropy run the fallback at once.

    Raises
    ------
    ArgumentError
        If there are more than `MAX_CANDIDATES`, or a number is NaN or out of its range.
    """

    candidates: tuple[Candidate, ...]
    fallback: HeadPlan
    aim: float
    escalation_aim: float
    worthwhile: float
    measured: bool = True
    priced: bool = True
    narrow: HeadPlan | None = None
    narrow_entropy: float = 0.0

    def __post_init__(self) -> None:
        costs = [x for c in self.candidates for x in (c.fixed, c.slope)]
        limits = [
            x
            for c in self.candidates
            for x in (c.entropy_below, c.saturation_most, c.score_most, c.share_most)
        ]
        limits += [self.aim, self.escalation_aim, self.worthwhile, self.narrow_entropy]
        if len(self.candidates) > MAX_CANDIDATES:
            got = f"{len(self.candidates)} candidates"
        elif not all(0 <= x <= float(FLOAT_MAX) for x in costs):
            got = f"costs {costs}"
        elif any(np.isnan(limits)):
            got = "a limit that is NaN"
        else:
            return
        raise ArgumentError(
            got=got,
            needed=f"at most {MAX_CANDIDATES} candidates with finite costs of at least 0",
            do="return None from compile where a policy does not fit a table",
        )

    @property
    def judged(self) -> bool:
        """Whether the errors of candidates must be measured."""
        return self.measured and self.aim < np.inf

    @property
    def record(self) -> NDArray[Any]:
        """The table as a device reads it: a zero-dimensional array of dtype `TABLE`."""
        record = np.zeros((), TABLE)
        record["count"] = len(self.candidates)
        for name in ("aim", "escalation_aim", "worthwhile"):
            record[name] = getattr(self, name)
        for row, c in zip(record["candidates"], self.candidates, strict=False):
            plan = c.plan
            row["kind"] = KINDS[plan.structure.kind]
            row["qk"], row["pv"] = FORMAT_CODES[plan.qk], FORMAT_CODES[plan.pv]
            row["knob"] = knob(plan.structure)
            for name in CANDIDATE.names[4:]:  # type: ignore[index]
                row[name] = getattr(c, name)
        return record

    def head_plan(self, choice: Any) -> HeadPlan:
        """Return the plan that one record of dtype `CHOICE` stands for, with its reason."""
        number, outcome = int(choice["candidate"]), int(choice["outcome"])
        if number == FALLBACK:
            return replace(self.narrow or self.fallback, reason=REASONS[outcome])
        plan = self.candidates[number].plan
        cost = float(choice["cost"]) * self.fallback.cost_estimate
        return replace(
            plan,
            reason=plan.reason or REASONS[outcome],
            cost_estimate=cost if self.priced else plan.cost_estimate,
            error_estimate=float(choice["error"]),
        )

    def number_of(self, plan: HeadPlan) -> int:
        """Return the candidate that runs like `plan` (estimates aside), or `FALLBACK`."""
        for number, c in enumerate(self.candidates):
            if _as_run(c.plan) == _as_run(plan):
                return number
        return FALLBACK


REASONS = {
    NOTHING: "dense: nothing could be cheaper at this size",
    NONFINITE: "dense: a measured number is not finite",
    OUTSIDE: "dense: the head is outside every candidate's limits",
    INACCURATE: "dense: no candidate is accurate enough",
    COSTLY: "dense: nothing cheaper keeps the budget",
    CHOSEN: "cheapest within budget",
}
"""What `explain()` says of an outcome."""


def decide_table(table: DecisionTable, measures: NDArray[Any]) -> NDArray[Any]:
    """Choose for every head; the NumPy twin of ``decide`` in decide.cuh.

    Among the candidates whose limits the head keeps, whose measured error is at most `aim` and
    whose numbers are finite, the cheapest is taken if its cost is below `worthwhile`; the
    fallback otherwise. Of equal costs the earlier candidate's, which is the safer one, counts.

    Parameters
    ----------
    table : DecisionTable
    measures : ndarray of `HEAD_MEASURES`, shape (heads,)

    Returns
    -------
    ndarray of `CHOICE`, shape (heads,)
    """
    record = table.record
    allowed = np.full((len(measures), MAX_CANDIDATES), record["aim"])
    return _cheapest(record, measures, measures["error"] <= allowed, _fallbacks(len(measures)))


def escalate_table(
    table: DecisionTable, measures: NDArray[Any], current: NDArray[Any], upper: NDArray[Any]
) -> NDArray[Any]:
    """Choose again for heads that missed the budget; the twin of ``escalate`` in decide.cuh.

    Only candidates before the failed one, which are safer, are considered. One of the same kind
    must keep `escalation_aim` after its predicted error was multiplied by the failed one's
    ``max(upper / error, 1)``; one of another kind must keep `aim`.

    Parameters
    ----------
    table : DecisionTable
    measures : ndarray of `HEAD_MEASURES`, shape (heads,)
    current : ndarray of int32, shape (heads,)
        The candidate that failed; `FALLBACK` stays.
    upper : ndarray of float32, shape (heads,)
        Certified error of what failed; inf where the certificate says nothing.

    Returns
    -------
    ndarray of `CHOICE`, shape (heads,)
    """
    record = table.record
    aim = record["escalation_aim"]
    choices = _fallbacks(len(measures))
    if not aim > 0:
        return choices
    error, number = measures["error"], np.arange(MAX_CANDIDATES)
    failed = np.where(current < 0, 0, current)
    known = error[np.arange(len(measures)), failed]
    kind = record["candidates"]["kind"]
    alike = kind[None] == kind[failed][:, None]
    with np.errstate(all="ignore"):
        corrected = error * upper.astype(np.float32)[:, None] <= (aim * known)[:, None]
    again = (known > 0)[:, None] & (error <= aim) & corrected
    accurate = np.where(alike, again, error <= record["aim"])
    return _cheapest(record, measures, accurate, choices, number < current[:, None])


def _fallbacks(heads: int) -> NDArray[Any]:
    choices = np.zeros(heads, CHOICE)
    choices["candidate"], choices["cost"] = FALLBACK, 1.0
    return choices


def _cheapest(
    record: NDArray[Any],
    measures: NDArray[Any],
    accurate: NDArray[np.bool_],
    choices: NDArray[Any],
    considered: NDArray[np.bool_] | None = None,
) -> NDArray[Any]:
    """Cheapest candidate of every head, one candidate after the other as a device does."""
    healthy = np.logical_and.reduce([_finite(measures[name]) for name in _FACTS])
    best = np.full(len(measures), record["worthwhile"])
    for c in range(int(record["count"])):
        candidate = record["candidates"][c]
        share, error = measures["share"][:, c], measures["error"][:, c]
        finite = healthy & _finite(share) & _finite(error)
        with np.errstate(all="ignore"):
            inside = (
                (measures["entropy_relative"] < candidate["entropy_below"])
                & (measures["saturation"] <= candidate["saturation_most"])
                & (measures["score_max_abs"] <= candidate["score_most"])
                & (share <= candidate["share_most"])
            )
            cost = candidate["fixed"] + candidate["slope"] * share
        outcome = np.select(
            [~finite, ~inside, ~accurate[:, c], ~(cost < best)],
            [NONFINITE, OUTSIDE, INACCURATE, COSTLY],
            CHOSEN,
        )
        if considered is not None:
            outcome = np.where(considered[:, c], outcome, NOTHING)
        taken = outcome == CHOSEN
        best[taken] = cost[taken]
        choices["candidate"][taken] = c
        choices["cost"][taken] = cost[taken]
        choices["error"][taken] = error[taken]
        choices["outcome"] = np.maximum(choices["outcome"], outcome)
    return choices


def _finite(x: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a measured number is neither negative, NaN nor infinite."""
    return np.asarray((x >= 0) & (x <= FLOAT_MAX))


def knob(structure: Structure) -> float:
    """Return the number that tells structures of one kind apart, 0 where there is none."""
    if isinstance(structure, Landmark):
        return structure.tau
    if isinstance(structure, ScoreSkip):
        return structure.lam
    return float(structure.rank) if isinstance(structure, LowRank) else 0.0


def _as_run(plan: HeadPlan) -> HeadPlan:
    return replace(plan, reason="", cost_estimate=1.0, error_estimate=0.0)
