"""Certificates of a problem's heads: by theorem where that suffices, else by fresh rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adaattn_core.backend import Samples
from adaattn_core.bounds import minimal_sample_size, order_statistic
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.charges import Question
from adaattn_core.certificates.data import Certificate, HeadCertificate, HeadTable
from adaattn_core.certificates.sample import sampled_certificate
from adaattn_core.certificates.theorem import theorem_certificates
from adaattn_core.facts import FactsTable, RawResult, RunFacts
from adaattn_core.lazy import LazyHeads
from adaattn_core.liverows import LiveRows
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex

ROUNDS = 2
"""Plans of a head that one call may test on sampled rows: the first and that of one escalation.
A later escalation goes to dense, which a theorem certifies."""
LOOK = 4.0
"""Rows that a plan is judged by, over the fewest that could do: more make a tighter order
statistic, and cost more (docs/design/0022). The confidence is split over all rounds."""


def rows_drawn(rows: float, confidence: float) -> int:
    """Return how many rows of a head a certificate of `rows` of them draws."""
    split = 1 - (1 - confidence) / ROUNDS
    return int(LOOK * minimal_sample_size(rows, split))


def rows_asked(rows: float, confidence: float) -> float:
    """Share of the drawn rows whose error a certificate of `rows` of all rows asks for.

    It is above `rows`: what is said of the rows that were not drawn takes a margin.
    """
    count = rows_drawn(rows, confidence)
    order = order_statistic(count, rows, 1 - (1 - confidence) / ROUNDS)
    return rows if order is None else max(order / count, rows)


@dataclass(frozen=True, slots=True)
class _Theorems:
    """What the theorems need besides facts and plan; keeps no array alive."""

    question: Question
    len_q: tuple[int, ...]

    @classmethod
    def of(cls, problem: AttentionProblem, budget: ErrorBudget | None) -> _Theorems:
        probabilistic = budget is not None and budget.guarantee == "probabilistic"
        question = Question(
            problem.dim_qk,
            problem.dim_v,
            problem.scale,
            problem.dtype,
            "probabilistic" if probabilistic else "worst_case",
            budget.confidence if budget is not None and probabilistic else 0.95,
            problem.softcap or 0.0,
            problem.sinks is not None,
        )
        return cls(question, tuple(span.len_q for span in problem.sequences))

    def certify(
        self,
        facts: Mapping[HeadIndex, RunFacts],
        plans: Mapping[HeadIndex, HeadPlan],
        heads: Sequence[HeadIndex],
    ) -> HeadTable:
        return theorem_certificates(
            FactsTable.of(facts, heads),
            [plans[index] for index in heads],
            [self.len_q[sequence] for sequence, _ in heads],
            self.question,
        )


class Certifier:
    """Certificates of a problem's heads; counts the sampling rounds that each head has used.

    A theorem is stronger than a sample, so it serves a sampled budget wherever it reaches it;
    without a `sampler` (the backend, if it `Samples`) it is all there is.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        sampler: Samples | None,
        budget: ErrorBudget | None,
        seed: int,
    ) -> None:
        self.problem, self.sampler, self.budget, self.seed = problem, sampler, budget, seed
        self.sampled = budget is not None and budget.guarantee == "sampled"
        self.shape = (len(problem.sequences), problem.heads_q)
        self.rounds: dict[HeadIndex, int] = {}
        self.live = LiveRows(problem)

    def exhausted(self, index: HeadIndex) -> bool:
        """Whether the head has no sampling round left: only a theorem can certify it then."""
        if self.sampled and self.sampler is None:
            return True
        return self.rounds.get(index, 0) >= ROUNDS

    def certify(self, raw: RawResult, plan: Plan, heads: Collection[HeadIndex]) -> Certificate:
        """Certify some heads: by theorem where that suffices, else by fresh rows."""
        theorems = _Theorems.of(self.problem, self.budget)
        certificates = theorems.certify(raw.facts, plan.heads, list(heads))
        budget = self.budget
        if budget is not None and self.sampled:
            failing = Certificate(certificates, self.shape).violations(budget)
            todo = [index for index in failing if not self.exhausted(index)]
            if todo:
                sampled = self._sample(raw, todo, budget)
                return Certificate({**certificates, **sampled}, self.shape)
        return Certificate(certificates, self.shape)

    def later(self, raw: RawResult, plan: Plan) -> Certificate:
        """Certify every head by theorem, when somebody looks; keeps no input array alive."""
        theorems, facts = _Theorems.of(self.problem, self.budget), raw.facts

        def make() -> HeadTable:
            return theorems.certify(facts, plan.heads, list(plan.heads))

        return Certificate(LazyHeads(make), self.shape)

    def mask_to_blame(
        self, raw: RawResult, plan: Plan, failing: Collection[HeadIndex]
    ) -> float | None:
        """Size of the additive mask if, but for the rounding of its sums, a theorem would do.

        None where that is so for no failing head.
        """
        if self.budget is None or not failing:
            return None
        facts = {index: raw.facts[index] for index in failing}
        without = {index: replace(known, bias_max_abs=0.0) for index, known in facts.items()}
        table = _Theorems.of(self.problem, self.budget).certify(
            without, plan.heads, list(failing)
        )
        would = table.holding(self.budget)
        sizes = [
            known.bias_max_abs
            for known, held in zip(facts.values(), would, strict=True)
            if held
        ]
        return max((size for size in sizes if size > 0), default=None)

    def _sample(
        self, raw: RawResult, todo: list[HeadIndex], budget: ErrorBudget
    ) -> dict[HeadIndex, HeadCertificate]:
        """Look at fresh rows."""
        count = rows_drawn(budget.rows, budget.confidence)
        rows: dict[HeadIndex, NDArray[np.int64]] = {}
        for index in todo:
            self.rounds[index] = self.rounds.get(index, 0) + 1
            live = self.live[index]
            rng = np.random.default_rng((self.seed, 0, *index, self.rounds[index]))
            every = len(live) <= count
            rows[index] = live if every else live[rng.integers(0, len(live), count)]
        assert self.sampler is not None, "exhausted() says so of every head"
        errors = self.sampler.row_errors(self.problem, raw, rows, enough=budget.rel)
        return {
            index: sampled_certificate(
                errors[index],
                raw.facts[index],
                rows=budget.rows,
                confidence=budget.confidence,
                len_q=len(self.live[index]),
                complete=len(self.live[index]) <= count,
                rounds=ROUNDS,
            )
            for index in todo
        }
