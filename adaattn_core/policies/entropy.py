"""EntropyPolicy: fixed thresholds on entropy, score magnitude, saturation and spectral proxies.

The policy that a reader expects from the name of the project: every decision is one comparison
that can be read aloud. It predicts no error; what it chooses is certified like any plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from adaattn_core.checks import real, whole
from adaattn_core.plan import HeadPlan
from adaattn_core.policies import compiling, fitting
from adaattn_core.policies.base import PolicyContext, safer
from adaattn_core.policies.table import Candidate, DecisionTable
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, Structure


@dataclass(frozen=True, slots=True)
class EntropyPolicy:
    """Thresholds.

    Attributes
    ----------
    score_8bit, score_16bit : float
        Largest absolute scaled score up to which 8-bit and 16-bit Q·Kᵀ are used.
    saturation_8bit : float
        Mean largest weight up to which 8-bit formats are used: a saturated row copies one
        value, and a score error of a few percent can make it copy another.
    entropy_diffuse : float
        Relative entropy from which attention stays dense.
    landmark_mass, landmark_share : float
        Landmarks are used where leaving `landmark_mass` takes at most this share of the keys.
    rank_participation : float
        Feature rank is used where the participation ratio is below this share of dim.
    least_len : int
        Shorter heads stay dense.
    """

    score_8bit: float = 24.0
    score_16bit: float = 256.0
    saturation_8bit: float = 0.8
    entropy_diffuse: float = 0.95
    landmark_mass: float = 0.1
    landmark_share: float = 0.1
    rank_participation: float = 0.1
    least_len: int = 4096

    name = "entropy"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            real(field.name, getattr(self, field.name), 0)
        whole("least_len", self.least_len)

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Ask for row facts, the landmark curve and the spectrum; for no trial."""
        if context.budget is None or not context.measures:
            return None
        landmarks: tuple[Structure, ...] = ()
        if "landmark" in context.capabilities.structures and context.has_far_field():
            landmarks = (self._landmark(context),)
        return MeasureRequest(
            rows=context.budget.rows,
            structures=landmarks,
            enough_error=float("inf"),
            formats=(),
            spectrum=True,
            seed=context.seed,
        )

    def _landmark(self, context: PolicyContext) -> Landmark:
        """Landmarks in the sizes that the backend prefers."""
        for sizes in context.capabilities.sizes:
            if isinstance(sizes, Landmark):
                return replace(sizes, tau=self.landmark_mass)
        return Landmark(tau=self.landmark_mass, screen_rank=0)

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Compare every head with the thresholds."""
        return {
            index: self.decide_head(stats.get(index, shape), context)
            for index, shape in context.shapes.items()
        }

    def decide_head(self, stats: HeadStats, context: PolicyContext) -> HeadPlan:
        """Choose for one head; pure and deterministic."""
        structure, why = self._structure(stats, context)
        qk, pv, because = self._formats(stats, context)
        return HeadPlan(structure=structure, qk=qk, pv=pv, reason=f"{why}; {because}")

    def _structure(self, stats: HeadStats, context: PolicyContext) -> tuple[Structure, str]:
        kinds = context.capabilities.structures
        if stats.nonfinite or not stats.sampled_rows:
            return Dense(), "dense: nothing measured, or non-finite or too large input"
        if min(stats.len_q, stats.len_kv) < self.least_len:
            return Dense(), f"dense: shorter than {self.least_len}"
        if stats.entropy_relative >= self.entropy_diffuse:
            return Dense(), f"dense: relative entropy {stats.entropy_relative:.2f}"
        if (
            "low_rank" in kinds
            and stats.participation_ratio < self.rank_participation * stats.dim_qk
        ):
            rank = max(8, -(-int(2 * stats.participation_ratio) // 8) * 8)
            return LowRank(min(rank, stats.dim_qk)), (
                f"low rank: participation ratio {stats.participation_ratio:.1f}"
            )
        # Without a curve the backend found no far field here, e.g. under a window.
        share = stats.landmark_curve.get(self.landmark_mass, math.inf)
        if "landmark" in kinds and share <= self.landmark_share:
            return self._landmark(context), (
                f"landmarks: {share:.1%} of keys leave {self.landmark_mass:g} of the mass"
            )
        if "block_sparse" in kinds and stats.entropy_relative < self.entropy_diffuse / 2:
            return BlockSparse(tau=self.landmark_mass / 2), (
                f"block sparse: relative entropy {stats.entropy_relative:.2f}"
            )
        return Dense(), "dense: mass neither in few keys nor in few directions"

    def _formats(self, stats: HeadStats, context: PolicyContext) -> tuple[str, str, str]:
        exact = context.exact_format
        score, saturation = stats.score_max_abs, stats.saturation
        if not stats.sampled_rows or stats.nonfinite:
            return exact, exact, f"{exact}: nothing measured"
        if score <= self.score_8bit and saturation <= self.saturation_8bit:
            for pv in ("e4m3", "f16"):
                if _saves("i8", pv, stats, context):
                    return "i8", pv, f"8 bit: |s| {score:.0f}, saturation {saturation:.2f}"
        if score <= self.score_16bit:
            for name in ("f16", "bf16"):
                if _saves(name, name, stats, context):
                    return name, name, f"16 bit: |s| {score:.0f}, saturation {saturation:.2f}"
        return exact, exact, f"{exact}: |s| {score:.0f}, saturation {saturation:.2f}"

    def compile(self, context: PolicyContext) -> DecisionTable | None:
        """Return the thresholds as limits of candidates, in order of preference.

        None where the backend offers feature ranks, which ask for the keys' spectrum. A table
        knows the share of scores kept, not the share of far keys that become landmarks:
        `landmark_share` is what landmarks may add to the least share. Costs stand for the
        order alone, and escalations go straight to dense.
        """
        if context.budget is None or "low_rank" in context.capabilities.structures:
            return None
        exact = context.exact_format
        choices = [
            (HeadPlan(structure=structure, qk=qk, pv=pv), of_structure | of_formats)
            for structure, of_structure in self._structures_by_limit(context)
            for qk, pv, of_formats in self._formats_by_limit(context)
            if not (isinstance(structure, Dense) and (qk, pv) == (exact, exact))
        ]
        candidates = tuple(
            Candidate(plan, fixed=(number + 1) / (len(choices) + 1), slope=0.0, **limits)
            for number, (plan, limits) in enumerate(choices)
        )
        return DecisionTable(
            candidates,
            compiling.dense_fallback(context),
            aim=math.inf,
            escalation_aim=0.0,
            worthwhile=1.0,
            priced=False,
        )

    def _structures_by_limit(
        self, context: PolicyContext
    ) -> Iterator[tuple[Structure, dict[str, float]]]:
        """Yield what `_structure` chooses from, and where."""
        kinds, shape = context.capabilities.structures, compiling.one_shape(context)
        if min(shape.len_q, shape.len_kv) >= self.least_len:
            if "landmark" in kinds and context.has_far_field(everywhere=True):
                structure = self._landmark(context)
                least = fitting.least_share(structure, shape)
                yield (
                    structure,
                    {
                        "entropy_below": self.entropy_diffuse,
                        "share_most": least + self.landmark_share,
                    },
                )
            if "block_sparse" in kinds:
                yield (
                    BlockSparse(tau=self.landmark_mass / 2),
                    {"entropy_below": self.entropy_diffuse / 2},
                )
        yield Dense(), {}

    def _formats_by_limit(
        self, context: PolicyContext
    ) -> Iterator[tuple[str, str, dict[str, float]]]:
        """Yield what `_formats` chooses from, and where."""
        shape = compiling.one_shape(context)
        narrow = {"score_most": self.score_8bit, "saturation_most": self.saturation_8bit}
        for pairs, limits in (
            ((("i8", "e4m3"), ("i8", "f16")), narrow),
            ((("f16", "f16"), ("bf16", "bf16")), {"score_most": self.score_16bit}),
        ):
            cheap = next((pair for pair in pairs if _saves(*pair, shape, context)), None)
            if cheap is not None:
                yield (*cheap, limits)
        yield context.exact_format, context.exact_format, {}

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the common ladder."""
        return safer(plan, upper, stats, context)


def _saves(qk: str, pv: str, shape: HeadStats, context: PolicyContext) -> bool:
    """Whether the backend runs both formats, faster than the exact one on heads like this."""
    costs, capabilities, exact = context.costs, context.capabilities, context.exact_format
    known = qk in capabilities.qk_formats and pv in capabilities.pv_formats
    if not known or not costs.runs(qk, pv):
        return False
    if not costs.runs(exact, exact):
        return True
    return costs.dense_cost(shape, qk, pv) < costs.dense_cost(shape, exact, exact)
