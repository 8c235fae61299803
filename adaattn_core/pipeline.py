"""One way through the code: problem -> stats -> plan -> run -> certificate, and escalation."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.backend import Backend, RawResult, RunFacts
from adaattn_core.bounds import minimal_sample_size
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificate import Certificate, HeadCertificate, LazyHeads
from adaattn_core.certify import sampled_certificate, theorem_certificate
from adaattn_core.costs import CostModel
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.fixed import ExactPolicy
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats, ProblemStats

ROUNDS = 2
"""Certificates that one call may draw per head: the first and that of one escalation; a sampled
confidence is split over them. A later escalation goes to dense, which a theorem certifies."""
SAMPLE_FACTOR = 8
"""Certificate rows over the fewest that could do: more rows make a tighter order statistic, and
so cheaper plans and fewer escalations (docs/design/0007)."""

Notes = dict[str, Any]


def run_pipeline(
    problem: AttentionProblem,
    backend: Backend,
    policy: Policy | None,
    budget: ErrorBudget | None,
    costs: CostModel,
    *,
    plan: Plan | None,
    seed: int,
    layer: str,
) -> tuple[RawResult, Plan, Certificate, ProblemStats | None, Notes]:
    """Run the five steps; see `adaattn_core.api.attention`."""
    capabilities = backend.capabilities()
    context = PolicyContext(
        budget=budget,
        capabilities=capabilities,
        costs=costs,
        dtype=problem.dtype,
        structural=problem.mask.is_structural,
        shapes=_shapes(problem),
        scale=problem.scale,
        seed=seed,
        layer=layer,
    )
    clock = _Clock()
    stats: ProblemStats | None = None
    workspace = None
    if plan is None:
        assert policy is not None
        request = policy.request(context)
        if request is not None:
            stats, workspace = backend.measure(problem, request)
            clock.stop("measure_seconds")
        heads = policy.decide(stats.heads if stats else {}, context)
        plan = Plan(heads, seed=seed, policy=policy.name, target=costs.name, layer=layer)
    plan.check_fits(problem)
    clock.stop("plan_seconds")
    raw = backend.run(problem, plan, workspace=workspace)
    clock.stop("run_seconds")
    certifier = _Certifier(problem, backend, budget, seed, measures=capabilities.measures)
    if budget is None:  # nobody waits for the verdict: a device may still be computing
        certificate = certifier.later(raw, plan)
    else:
        certificate = certifier.certify(raw, plan, list(plan))
    clock.stop("certify_seconds")
    escalated: dict[str, list[str]] = {}
    if budget is not None:
        climbing = policy or ExactPolicy()
        failing = certificate.violations(budget)
        while failing and budget.on_violation == "escalate":
            changed = {}
            for index in failing:
                known = stats.heads[index] if stats else context.shapes[index]
                upper = certificate[index].upper
                step = climbing.escalate(plan[index], upper, known, context)
                while certifier.exhausted(index) and step and step.structure.kind != "dense":
                    step = climbing.escalate(step, upper, known, context)
                if step is not None:
                    changed[index] = step
                    escalated.setdefault(f"{index[0]},{index[1]}", []).append(
                        f"{step.structure.kind} {step.qk}/{step.pv}"
                    )
            if not changed:
                break
            plan = plan.with_heads(changed)
            raw = backend.run(problem, plan, workspace=workspace, heads=list(changed), into=raw)
            certificate = certificate.merge(certifier.certify(raw, plan, list(changed)))
            failing = certificate.violations(budget)
        clock.stop("escalate_seconds")
        _check_outcome(certificate, budget, failing, backend)
    return raw, plan, certificate, stats, {**clock.seconds, "escalated": escalated}


@dataclass(frozen=True, slots=True)
class _Theorem:
    """What the theorems need besides facts and plan: sizes, and the guarantee asked for."""

    dim_qk: int
    dim_v: int
    scale: float
    dtype: str
    len_q: tuple[int, ...]
    guarantee: str
    confidence: float

    @classmethod
    def of(cls, problem: AttentionProblem, budget: ErrorBudget | None) -> _Theorem:
        probabilistic = budget is not None and budget.guarantee == "probabilistic"
        return cls(
            problem.dim_qk,
            problem.dim_v,
            problem.scale,
            problem.dtype,
            tuple(span.len_q for span in problem.sequences),
            "probabilistic" if probabilistic else "worst_case",
            budget.confidence if budget is not None and probabilistic else 0.95,
        )

    def certify(self, facts: RunFacts, head: HeadPlan, sequence: int) -> HeadCertificate:
        return theorem_certificate(
            facts,
            head,
            dim_qk=self.dim_qk,
            dim_v=self.dim_v,
            scale=self.scale,
            dtype=self.dtype,
            len_q=self.len_q[sequence],
            guarantee=self.guarantee,
            confidence=self.confidence,
        )


class _Certifier:
    """Certificates of a problem's heads; counts the sampling rounds that each head has used.

    A theorem is stronger than a sample, so it serves a sampled budget wherever it reaches it;
    on a backend that does not measure (`measures` false) it is all there is.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        backend: Backend,
        budget: ErrorBudget | None,
        seed: int,
        *,
        measures: bool,
    ) -> None:
        self.problem, self.backend, self.budget, self.seed = problem, backend, budget, seed
        self.sampled = budget is not None and budget.guarantee == "sampled"
        self.measures = measures
        self.shape = (len(problem.sequences), problem.heads_q)
        self.rounds: dict[HeadIndex, int] = {}

    def exhausted(self, index: HeadIndex) -> bool:
        """Whether the head has no sampling round left: only a theorem can certify it then."""
        if self.sampled and not self.measures:
            return True
        return self.rounds.get(index, 0) >= ROUNDS

    def certify(self, raw: RawResult, plan: Plan, heads: Collection[HeadIndex]) -> Certificate:
        """Certify some heads: by theorem where that suffices, else by fresh rows."""
        theorem = _Theorem.of(self.problem, self.budget)
        certificates = {i: theorem.certify(raw.facts[i], plan[i], i[0]) for i in heads}
        budget = self.budget
        if budget is not None and self.sampled:
            todo = [
                index
                for index in heads
                if not certificates[index].holds(budget) and not self.exhausted(index)
            ]
            if todo:
                certificates |= self._sample(raw, todo, budget)
        return Certificate(certificates, self.shape)

    def later(self, raw: RawResult, plan: Plan) -> Certificate:
        """Certify every head by theorem, when somebody looks; keeps no input array alive."""
        theorem, facts = _Theorem.of(self.problem, self.budget), raw.facts

        def make() -> dict[HeadIndex, HeadCertificate]:
            return {i: theorem.certify(facts[i], head, i[0]) for i, head in plan.heads.items()}

        return Certificate(LazyHeads(make), self.shape)

    def _sample(
        self, raw: RawResult, todo: list[HeadIndex], budget: ErrorBudget
    ) -> dict[HeadIndex, HeadCertificate]:
        split = 1 - (1 - budget.confidence) / ROUNDS
        count = int(SAMPLE_FACTOR * minimal_sample_size(budget.rows, split))
        rows: dict[HeadIndex, NDArray[np.int64]] = {}
        for index in todo:
            len_q = self.problem.sequences[index[0]].len_q
            self.rounds[index] = self.rounds.get(index, 0) + 1
            rng = np.random.default_rng((self.seed, 0, *index, self.rounds[index]))
            rows[index] = np.arange(len_q) if len_q <= count else rng.integers(0, len_q, count)
        errors = self.backend.row_errors(self.problem, raw, rows)
        return {
            index: sampled_certificate(
                errors[index],
                raw.facts[index],
                rows=budget.rows,
                confidence=budget.confidence,
                len_q=self.problem.sequences[index[0]].len_q,
                complete=self.problem.sequences[index[0]].len_q <= count,
                rounds=ROUNDS,
            )
            for index in todo
        }


def _check_outcome(
    certificate: Certificate,
    budget: ErrorBudget,
    failing: Collection[HeadIndex],
    backend: Backend,
) -> None:
    """Raise what the caller asked for if heads still miss the budget."""
    failing = [i for i in failing if not certificate[i].nonfinite]
    if not failing or budget.on_violation == "report":
        return
    worst = max(failing, key=lambda i: certificate[i].upper)
    upper, proved = certificate[worst].upper, certificate[worst].guarantee
    facts = {"best_upper": upper, "heads": tuple(failing)}
    got = (
        f"{len(failing)} heads above rel={budget.rel}; worst: sequence {worst[0]}, head"
        f" {worst[1]} with upper {upper:.3g} ({proved})"
    )
    do = "loosen the budget, pass wider inputs (f64), or ask for a sampled guarantee"
    if budget.guarantee == "sampled" and not backend.capabilities().measures:
        got += f', from backend "{backend.name}", which samples no rows'
        do = 'loosen the budget, or use a backend that samples (backend="numpy")'
    elif budget.guarantee == "sampled":
        do = "loosen the budget, or pass wider inputs (f64)"
    if budget.on_violation == "raise":
        raise CertificateViolation(
            got=got,
            needed=f"every head within {budget.rel}",
            do='loosen the budget, or use on_violation="escalate"',
            **facts,
        )
    raise BudgetInfeasibleError(
        got=got,
        needed=f"a plan that keeps rel={budget.rel} with guarantee {budget.guarantee}",
        do=do,
        **facts,
    )


def _shapes(problem: AttentionProblem) -> dict[HeadIndex, HeadStats]:
    """Sizes of every head, as stats without measurements."""
    out = {}
    for sequence in problem.sequences:
        shape = HeadStats(
            len_q=sequence.len_q,
            len_kv=sequence.len_kv,
            dim_qk=problem.dim_qk,
            dim_v=problem.dim_v,
            visible=problem.visible_scores(sequence.index),
        )
        out.update({(sequence.index, head): shape for head in range(problem.heads_q)})
    return out


class _Clock:
    """Wall-clock seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        """Book the time since the last call under `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
