"""The policy contract, and the ladder of safer plans that every policy escalates along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from adaattn_core.backend import Capabilities
from adaattn_core.budget import ErrorBudget
from adaattn_core.costs import CostModel
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest, problem_shapes
from adaattn_core.structure import BlockSparse, Dense, Landmark, ScoreSkip, Structure


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a decision may depend on besides the stats; holds no array.

    Attributes
    ----------
    budget : ErrorBudget or None
        None asks for exact attention at the input's own precision.
    capabilities : Capabilities
        Of the backend that will run.
    costs : CostModel
        Of the machine that the plan is for.
    dtype : str
        Format of the inputs.
    structural : bool
        Whether the mask is an interval per row.
    prefix : frozenset of int
        Sequences whose rows all see the first keys up to a last one (causal and full masks,
        key lengths and ragged batches included): landmarks need no less.
    shapes : mapping of (sequence, head) to HeadStats
        Sizes of every head, before anything is measured.
    scale : float
    seed : int
    layer : str
    measures : bool
        Whether the backend `Measures`: where not, there are no stats.
    softcap : float
        What scores are capped to; 0 for no cap.
    """

    budget: ErrorBudget | None
    capabilities: Capabilities
    costs: CostModel
    dtype: str
    structural: bool
    shapes: Mapping[HeadIndex, HeadStats]
    scale: float
    seed: int
    layer: str = ""
    prefix: frozenset[int] = frozenset()
    measures: bool = True
    softcap: float = 0.0

    @classmethod
    def of(
        cls,
        problem: AttentionProblem,
        budget: ErrorBudget | None,
        capabilities: Capabilities,
        costs: CostModel,
        *,
        seed: int,
        layer: str,
        measures: bool,
    ) -> PolicyContext:
        """Return the context of a problem."""
        return cls(
            budget=budget,
            capabilities=capabilities,
            costs=costs,
            dtype=problem.dtype,
            structural=problem.mask.is_structural,
            shapes=problem_shapes(problem),
            scale=problem.scale,
            seed=seed,
            layer=layer,
            prefix=problem.prefix_sequences(),
            measures=measures,
            softcap=problem.softcap or 0.0,
        )

    def has_far_field(self, *, everywhere: bool = False) -> bool:
        """Whether rows of some sequence here (`everywhere`: of every one) see a prefix.

        Where they do not there is no far field, and landmarks stand for nothing.
        """
        found = (sequence in self.prefix for sequence, _ in self.shapes)
        return all(found) if everywhere else any(found)

    @property
    def exact_format(self) -> str:
        """Format of exact attention: the input's own, or f32 where that is only emulated.

        A format that the machine planned for does not have is none either.
        """
        native = self.dtype in self.capabilities.qk_formats and self.dtype in self.costs.flops
        emulated = self.dtype in self.capabilities.emulated_formats
        return self.dtype if native and not emulated else "f32"


@runtime_checkable
class Policy(Protocol):
    """Decides; computes nothing of the problem's size."""

    name: str

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Return what must be measured before deciding, or None for nothing."""
        ...

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return a plan for every head."""
        ...

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Return a safer plan for a head that missed the budget, or None at the top.

        `upper` is what the certificate of `plan` says; inf where it says nothing.
        """
        ...


LEAST_TAU = 0.002
"""Landmark mass below which dense is the next rung."""
ERROR_EXPONENT = 0.7
"""Power of tau by which a landmark head's error is taken to fall where too little was tried to
fit one (`policies.fitting`); a wrong one costs a rerun."""
SKIP_ERROR_EXPONENT = 0.55
"""Power of lam by which the error of a score-then-skip head falls (median of real heads)."""
AIM = 0.75
"""An escalation aims at this share of the budget, so that it need not be repeated."""


def safer(
    plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
) -> HeadPlan | None:
    """Return the next safer plan: first the structure, then the formats, one rung at a time."""
    rel = context.budget.rel if context.budget is not None else 0.0
    allowed = min(rel / upper, 1.0) if upper > 0 else 0.0
    structure = _safer_structure(plan.structure, allowed, stats)
    if structure is not None and structure.kind in context.capabilities.structures:
        return replace(plan, structure=structure, reason="escalated: safer structure")
    formats = _wider(plan.qk, plan.pv, context)
    if formats is None:
        return None
    return replace(plan, qk=formats[0], pv=formats[1], reason="escalated: wider format")


def _safer_structure(
    structure: Structure, allowed: float, stats: HeadStats
) -> Structure | None:
    """Next structure; `allowed` is the budget over the certified error (0 = unknown)."""
    if isinstance(structure, Dense):
        return None
    if isinstance(structure, Landmark):
        shrink = min(max((AIM * allowed) ** (1 / ERROR_EXPONENT), 0.1), 0.6)
        tau = shrink * min(structure.tau, effective_tau(stats))
        return replace(structure, tau=tau) if tau > LEAST_TAU else Dense()
    if isinstance(structure, BlockSparse) and structure.blocks is None and structure.tau > 0.01:
        return replace(structure, tau=structure.tau / 4)
    if isinstance(structure, ScoreSkip) and structure.lam > 1e-6:
        shrink = (AIM * allowed) ** (1 / SKIP_ERROR_EXPONENT)
        return replace(structure, lam=structure.lam * min(max(shrink, 0.1), 0.6))
    return Dense()


def effective_tau(stats: HeadStats) -> float:
    """Landmark mass below which more than the least number of landmarks is needed.

    Landmarks come in multiples of 64; where fewer carry the mass, a smaller tau changes nothing
    until it passes this value, read off the measured landmark curve.
    """
    least = 64 * stats.len_q / max(stats.visible, 1)
    needing = [tau for tau, share in stats.landmark_curve.items() if share > least]
    return max(needing, default=min(stats.landmark_curve, default=1.0))


def _wider(qk: str, pv: str, context: PolicyContext) -> tuple[str, str] | None:
    ladder = ("e4m3", "i8", "bf16", "f16", "tf32", "f32", "f64")
    limit = "f64" if context.dtype == "f64" else "f32"
    usable = [
        name
        for name in ladder[: ladder.index(limit) + 1]
        if name in context.capabilities.qk_formats and name in context.capabilities.pv_formats
    ]
    position = max(ladder.index(qk), ladder.index(pv))
    for name in usable:
        if ladder.index(name) > position or (name == ladder[position] and qk != pv):
            return name, name
    return None
