"""BudgetPolicy: the cheapest predicted plan whose predicted error keeps the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from adaattn_core.certificates.certifier import rows_asked
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.checks import real, shown
from adaattn_core.errors import ArgumentError
from adaattn_core.plan import HeadPlan
from adaattn_core.policies import compiling, fitting
from adaattn_core.policies.base import (
    AIM,
    LEAST_TAU,
    PolicyContext,
    effective_tau,
    safer,
)
from adaattn_core.policies.narrow import narrow_plan
from adaattn_core.policies.offers import format_pairs, landmark_of, score_skip_of
from adaattn_core.policies.predicting import predicted_facts
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import (
    BlockSparse,
    Dense,
    Landmark,
    LowRank,
    ScoreSkip,
    Structure,
)

ESCALATED_LAM = 1e-3
"""Weight threshold of score-then-skip that a head climbs to when its landmarks fell short."""
LANDMARK_SHARE = 0.2
"""Share that landmarks are taken to keep before any head was measured."""
USUAL_SHARE = 0.15
"""Share that score-then-skip keeps of heads on which it was not tried."""


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """The default policy.

    For every head: predict the error of every structure and format from what was measured, keep
    those within `margin` of the budget, take the cheapest. Sampled guarantees predict with the
    held-out probe rows; the other two predict with the theorems themselves.

    Attributes
    ----------
    taus : tuple of float
        Landmark masses tried, cheapest first; where the first is not accurate enough, a mass is
        fitted through the tried ones so that the predicted error just keeps the budget.
    lams : tuple of float
        Weight thresholds of score-then-skip tried, cheapest first.
    table_taus, table_lams : tuple of float
        The same where the policy is compiled (`compile`), which fits nothing between them. The
        first mass leaves everything to pools: heads whose mass is everywhere may be served so.
    margin, table_margin : float
        Share of the budget that a *sampled estimate* may use up: of the quantile that the
        certificate will take of other rows. The rest is for what differs between draws.
    worthwhile, table_worthwhile : float
        A structure is tried only where its predicted cost is below this share of dense. Where
        the policy is compiled, the first (on usual heads) decides whether anything is measured
        at all, and the larger of both what is taken of what was: measuring is paid for by then.
    diffuse : float
        Relative entropy from which no far-field structure is tried: the mass is everywhere. A
        compiled policy has the error of every candidate measured, and needs no such rule.
    narrow_worthwhile : float
        Dense heads of a compiled policy run in 8 bits first where that costs less than this
        share of dense, their certificate counted. The rest pays for heads that miss the budget.
    narrow_diffuse : float
        Relative entropy from which a compiled policy runs dense heads in 8 bits first, where
        it is measured: scores of heads that look at few keys are large, and i8 errs by more.
    low_rank_participation : float
        A feature rank is tried where the keys' participation ratio is below this share of dim.
    """

    taus: tuple[float, ...] = (0.1, 0.02)
    lams: tuple[float, ...] = (5e-3, 2e-3, 1e-3, 5e-4)
    table_taus: tuple[float, ...] = (0.999, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
    table_lams: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    margin: float = 0.65
    table_margin: float = 0.65
    worthwhile: float = 0.8
    table_worthwhile: float = 0.95
    diffuse: float = 0.97
    narrow_worthwhile: float = 0.82
    narrow_diffuse: float = 0.8
    low_rank_participation: float = 0.25

    name = "budget"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                if not isinstance(value, list | tuple):
                    raise ArgumentError(
                        got=f"{field.name}={shown(value)}",
                        needed="a tuple of numbers in (0, 1)",
                        do=f"e.g. {field.name}={field.default}",
                    )
                shares = tuple(real(field.name, x, 0, 1, open_ends=True) for x in value)
                object.__setattr__(self, field.name, shares)
            else:
                real(field.name, value, 0)

    # -- what to measure ---------------------------------------------------------------------
    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Ask for the structures and formats that could pay on the target."""
        budget = context.budget
        if budget is None or not context.measures:
            return None
        sampled = budget.guarantee == "sampled"
        structures = tuple(
            s for s in self._structures(context) if self._could_pay(s, context, sampled)
        )
        longest = max(context.shapes.values(), key=lambda s: s.visible, default=None)
        pairs: tuple[tuple[str, str], ...] = ()
        if sampled and longest is not None:
            pairs = tuple(p for p in format_pairs(longest, context) if p != ("f32", "f32"))
        if not structures and not pairs and sampled:
            return None
        return MeasureRequest(
            rows=rows_asked(budget.rows, budget.confidence) if sampled else budget.rows,
            structures=structures,
            enough_error=self.margin * budget.rel,
            formats=pairs,
            spectrum=not sampled,
            seed=context.seed,
            enough_share=self._enough_share(context),
            most_share=self._most_share(context),
        )

    def _enough_share(self, context: PolicyContext) -> float:
        """Share up to which landmarks are cheaper than score-then-skip could be."""
        shape = max(context.shapes.values(), key=lambda s: s.visible, default=None)
        if shape is None:
            return 1.0
        skip = HeadPlan(structure=score_skip_of(ESCALATED_LAM, context))
        bar = context.costs.head_cost(shape, skip, fitting.least_share(skip.structure, shape))
        landmark = HeadPlan(structure=landmark_of(self.taus[0], context))
        none, whole = (context.costs.head_cost(shape, landmark, share) for share in (0, 1))
        return min(max((bar - none) / max(whole - none, 1e-30), 0.0), 1.0)

    def _most_share(self, context: PolicyContext) -> float:
        """Share from which on landmarks cost more than `worthwhile` of dense."""
        shape = max(context.shapes.values(), key=lambda s: s.visible, default=None)
        if shape is None:
            return 1.0
        plan = HeadPlan(structure=landmark_of(self.taus[0], context))
        none, whole = (
            context.costs.head_cost(shape, plan, share, measured=True) for share in (0, 1)
        )
        bar = self.worthwhile * context.costs.dense_cost(shape)
        return min(max((bar - none) / max(whole - none, 1e-30), 0.0), 1.0)

    def _structures(self, context: PolicyContext) -> Iterator[Structure]:
        kinds = context.capabilities.structures
        rel = context.budget.rel if context.budget else 0.0
        if "landmark" in kinds and context.has_far_field():
            for tau in self.taus:
                yield landmark_of(tau, context)
        if "score_skip" in kinds:
            longest = max((s.len_kv for s in context.shapes.values()), default=1)
            # The smallest keeps the budget by theorem; the others are judged on held-out rows.
            for lam in (*self.lams, min(rel / (8 * max(longest, 1)), 0.1)):
                yield score_skip_of(lam, context)
        if "low_rank" in kinds:
            dim = min((s.dim_qk for s in context.shapes.values()), default=1)
            for rank in (dim // 4, dim // 2):
                if rank >= 8:
                    yield LowRank(rank)

    def _could_pay(self, structure: Structure, context: PolicyContext, sampled: bool) -> bool:
        """Whether the structure could beat dense on any head, at its least possible share."""
        if not sampled and isinstance(structure, Landmark | BlockSparse):
            return False  # no theorem bounds what they leave out
        plan = HeadPlan(structure=structure)
        for shape in context.shapes.values():
            share = fitting.least_share(structure, shape)
            dense = context.costs.dense_cost(shape)
            if context.costs.head_cost(shape, plan, share) < self.worthwhile * dense:
                return True
        return False

    # -- what to choose ----------------------------------------------------------------------
    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Choose for every head on its own."""
        return {
            index: self.decide_head(stats.get(index, shape), context)
            for index, shape in context.shapes.items()
        }

    def decide_head(self, stats: HeadStats, context: PolicyContext) -> HeadPlan:
        """Choose for one head; pure and deterministic."""
        budget = context.budget
        widest = context.exact_format
        dense = context.costs.dense_cost(stats)
        why = "dense: nothing cheaper keeps the budget"
        kinds = context.capabilities.structures
        lacking = [kind for kind in ("landmark", "score_skip") if kind not in kinds]
        if lacking:
            why += f"; not offered here: {', '.join(lacking)}"
        fallback = HeadPlan(qk=widest, pv=widest, reason=why)
        fallback = replace(
            fallback, cost_estimate=_ratio(context.costs.head_cost(stats, fallback, 1.0), dense)
        )
        if budget is None or stats.nonfinite or not stats.visible:
            why = "non-finite or too large input" if stats.nonfinite else "nothing to save"
            return replace(fallback, reason=f"dense: {why}")
        best = fallback
        for plan, share in self._candidates(stats, context):
            cost = _ratio(context.costs.head_cost(stats, plan, share, measured=True), dense)
            if cost < best.cost_estimate and plan.error_estimate <= self._allowed(context):
                best = replace(plan, cost_estimate=cost, reason=self._reason(stats))
        return best

    def _allowed(self, context: PolicyContext) -> float:
        assert context.budget is not None
        sampled = context.budget.guarantee == "sampled"
        return context.budget.rel * (self.margin if sampled else 1.0)

    def _candidates(
        self, stats: HeadStats, context: PolicyContext
    ) -> Iterator[tuple[HeadPlan, float]]:
        """Plans with their predicted error and share."""
        assert context.budget is not None
        shares: list[tuple[Structure, float, float]] = [(Dense(), 1.0, 0.0)]
        for estimate in stats.structures:
            if self._admissible(estimate.structure, stats):
                shares.append((estimate.structure, estimate.share, estimate.row_error_estimate))
        aim = 0.999 * self._allowed(context)
        for kind, least in ((Landmark, LEAST_TAU), (ScoreSkip, 0.0)):
            between = fitting.fitted(stats, kind, aim)
            if between is not None and self._admissible(between[0], stats):
                value, known = fitting.knob(between[0]), fitting.tried(stats, kind)
                if len(known) > 1 and least < value < fitting.knob(known[-2].structure):
                    shares.append((*between, aim))
        for structure, share, error in shares:
            for qk, pv in format_pairs(stats, context):
                if context.budget.guarantee == "sampled":
                    exact = (qk, pv) == (context.exact_format,) * 2
                    rounding = 0.0 if exact else stats.format_errors.get((qk, pv), float("inf"))
                    total = error + rounding
                    total = math.inf if math.isnan(total) else total
                    yield HeadPlan(structure, qk, pv, error_estimate=total), share
                else:
                    plan = HeadPlan(structure, qk, pv)
                    yield self._with_theorem(plan, stats, context), share

    def _admissible(self, structure: Structure, stats: HeadStats) -> bool:
        """Entropy and spectral proxies: which structures are worth a look on this head."""
        if isinstance(structure, Landmark | BlockSparse):
            return stats.entropy_relative < self.diffuse
        if isinstance(structure, LowRank):
            return stats.participation_ratio < self.low_rank_participation * stats.dim_qk
        return True

    def _with_theorem(
        self, plan: HeadPlan, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan:
        """Predict the certificate of a plan from norms, as the theorems will after the run."""
        assert context.budget is not None
        stochastic = context.budget.guarantee == "probabilistic" and plan.qk in ("i8", "e4m3")
        plan = replace(plan, rounding="stochastic" if stochastic else "nearest")
        certificate = theorem_certificate(
            predicted_facts(plan, stats),
            plan,
            dim_qk=stats.dim_qk,
            dim_v=stats.dim_v,
            scale=context.scale,
            dtype=context.dtype,
            len_q=stats.len_q,
            guarantee="probabilistic" if stochastic else "worst_case",
            confidence=min(context.budget.confidence, 1 - 1e-9),
            softcap=context.softcap,
        )
        return replace(plan, error_estimate=certificate.upper)

    def _reason(self, stats: HeadStats) -> str:
        parts = [f"entropy {stats.entropy_relative:.2f}", f"|s| {stats.score_max_abs:.0f}"]
        parts.append(f"saturation {stats.saturation:.2f}")
        return f"cheapest within budget ({', '.join(parts)})"

    # -- the same as data ----------------------------------------------------------------------
    def compile(self, context: PolicyContext) -> DecisionTable | None:
        """Return the policy as a table; None for guarantees that theorems predict.

        The table differs from `decide` in that nothing is fitted between `table_taus` and
        `table_lams`, structures keep the inputs' own format, and errors are those that were
        measured with a candidate's formats.
        """
        budget, kinds = context.budget, context.capabilities.structures
        if budget is None or budget.guarantee != "sampled":
            return None
        exact = context.exact_format
        candidates = [
            compiling.priced(HeadPlan(qk=qk, pv=pv), context)
            for qk, pv in format_pairs(compiling.one_shape(context), context)
            if (qk, pv) != (exact, exact)
        ]
        structures: list[Structure] = []
        if "landmark" in kinds and context.has_far_field(everywhere=True):
            structures += [landmark_of(tau, context) for tau in self.table_taus]
        if "score_skip" in kinds:
            structures += [score_skip_of(lam, context) for lam in self.table_lams]
        for structure in structures:
            plan = HeadPlan(structure=structure, qk=exact, pv=exact)
            candidates.append(compiling.priced(plan, context))
        return DecisionTable(
            compiling.worth_measuring(candidates, context, self.worthwhile, LANDMARK_SHARE),
            compiling.dense_fallback(context),
            aim=self.table_margin * budget.rel,
            escalation_aim=AIM * budget.rel,
            worthwhile=max(self.worthwhile, self.table_worthwhile),
            narrow=narrow_plan(context, self.table_margin * budget.rel, self.narrow_worthwhile),
            narrow_entropy=self.narrow_diffuse,
        )

    # -- what to do when the certificate says no ----------------------------------------------
    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Take the cheapest structure that should do now that one certified error is known.

        Landmarks are tried again with the mass at which their predicted error, corrected by
        how far the certificate lay above the prediction, keeps the budget; score-then-skip
        with what was measured of it; dense otherwise.
        """
        if not isinstance(plan.structure, Landmark) or context.budget is None:
            return safer(plan, upper, stats, context)
        aim = AIM * context.budget.rel
        surprise = max(upper / plan.error_estimate, 1.0) if plan.error_estimate > 0 else 1.0
        candidates = [self._skipping(stats, context)]
        if upper < math.inf:
            candidates.append(self._more_landmarks(plan.structure, aim / surprise, stats))
        best: tuple[Structure, float] = (
            Dense(),
            context.costs.dense_cost(stats),
        )
        for structure, share in filter(None, candidates):
            step = replace(plan, structure=structure)
            cost = context.costs.head_cost(stats, step, share, measured=True)
            if cost < best[1]:
                best = structure, cost
        return replace(plan, structure=best[0], reason="escalated: safer structure")

    def _more_landmarks(
        self, structure: Landmark, aim: float, stats: HeadStats
    ) -> tuple[Structure, float] | None:
        """Mass at which the predicted error is `aim`, and the share that it should keep."""
        found = fitting.fitted(stats, Landmark, aim)
        tau = 0.6 * min(structure.tau, effective_tau(stats))
        if found is not None:
            tau = min(tau, fitting.knob(found[0]))
        if not tau > LEAST_TAU:
            return None
        step = replace(structure, tau=tau)
        return step, fitting.share_of(step, stats)

    def _skipping(
        self, stats: HeadStats, context: PolicyContext
    ) -> tuple[Structure, float] | None:
        """Score-then-skip that should keep the budget, and the share that it should keep."""
        if "score_skip" not in context.capabilities.structures:
            return None
        if not fitting.tried(stats, ScoreSkip):
            return score_skip_of(ESCALATED_LAM, context), USUAL_SHARE
        for estimate in stats.structures:
            fits = estimate.row_error_estimate <= self._allowed(context)
            if fits and isinstance(estimate.structure, ScoreSkip):
                return estimate.structure, estimate.share
        return fitting.fitted(stats, ScoreSkip, self._allowed(context))


def _ratio(cost: float, dense: float) -> float:
    return cost / dense if dense > 0 else 1.0
