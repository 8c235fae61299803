"""One way through the code: problem -> stats -> plan -> run -> certificate, and escalation."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.certifier import Certifier
from adaattn_core.certificates.data import Certificate
from adaattn_core.costs import CostModel
from adaattn_core.deciding import Adapted, Decides, certificate_later, compiled_for
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation
from adaattn_core.facts import RawResult
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.fixed import ExactPolicy
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import ProblemStats, problem_shapes
from adaattn_core.structure import Dense

Notes = dict[str, Any]

DO_ESCALATE = 'loosen the budget, or use on_violation="escalate"'

RAN_DENSE = "ran dense: a row sees NaN or Inf, or scores might overflow"
"""Reason in the plan of a head that ran dense whatever its structure."""


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
    drawn: bool = False,
    profile: bool = False,
) -> tuple[RawResult, Plan, Certificate, ProblemStats | None, Notes]:
    """Run the five steps; see `adaattn_core.api.attention`.

    A backend that `Decides` makes them on its device in one call; any other policy, budget or
    problem takes them one by one. `drawn` says that the seed was drawn, not given.
    """
    clock = _Clock()
    reason = ""
    if plan is None and policy and budget and isinstance(backend, Decides):
        rules = compiled_for(problem, backend, policy, budget, costs, layer)
        given = None if drawn else seed
        adapted = (
            rules
            if isinstance(rules, str)
            else backend.adapt(problem, rules, budget, seed=given, profile=profile)
        )
        if isinstance(adapted, Adapted):
            certificate = certificate_later(problem, adapted, budget, _check_outcome)
            plan = Plan(
                adapted.plans, seed=adapted.seed, policy=policy.name, target=costs.name,
                layer=layer,
            )  # fmt: skip
            clock.stop("host_seconds")
            notes: Notes = {**clock.seconds, **adapted.notes}
            return adapted.raw, plan, certificate, ProblemStats(adapted.stats), notes
        reason = adapted
    capabilities = backend.capabilities()
    context = PolicyContext(
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
    )
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
    ran_dense = sorted(raw.ran_dense)
    plan = plan.with_heads(
        {i: replace(plan[i], structure=Dense(), reason=RAN_DENSE) for i in ran_dense}
    )
    clock.stop("run_seconds")
    certifier = Certifier(problem, backend, budget, seed, measures=capabilities.measures)
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
        blamed = certifier.mask_to_blame(raw, plan, failing)
        _check_outcome(certificate, budget, failing, backend, blamed)
    notes = {**clock.seconds, "escalated": escalated}
    if reason:
        notes["planned_on_host"] = reason
    if ran_dense:
        notes["ran_dense"] = [f"{sequence},{head}" for sequence, head in ran_dense]
    return raw, plan, certificate, stats, notes


def _check_outcome(
    certificate: Certificate,
    budget: ErrorBudget,
    failing: Collection[HeadIndex],
    backend: Backend | None,
    mask_max_abs: float | None,
) -> None:
    """Raise what the caller asked for if heads still miss the budget.

    `mask_max_abs` is the size of the additive mask where that is to blame.
    """
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
    unsampled = backend is not None and not backend.capabilities().measures
    if backend is not None and budget.guarantee == "sampled" and unsampled:
        got += f', from backend "{backend.name}", which samples no rows'
        do = 'loosen the budget, or use a backend that samples (backend="numpy")'
    elif budget.guarantee == "sampled":
        do = "loosen the budget, or pass wider inputs (f64)"
    if mask_max_abs is not None:
        got += f"; the additive mask is to blame: it adds up to {mask_max_abs:.3g} to a score"
        do = "mask keys with -inf or Mask.boolean, shift the mask's rows, or " + do
    if budget.on_violation == "raise":
        raise CertificateViolation(
            got=got,
            needed=f"every head within {budget.rel}",
            do=do if mask_max_abs is not None else DO_ESCALATE,
            **facts,
        )
    raise BudgetInfeasibleError(
        got=got,
        needed=f"a plan that keeps rel={budget.rel} with guarantee {budget.guarantee}",
        do=do,
        **facts,
    )


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
