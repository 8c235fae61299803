"""One way through the code: problem -> stats -> plan -> run -> certificate, and escalation."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from adaattn_core.backend import Backend, Capabilities, Measures, Samples
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.certifier import Certifier
from adaattn_core.certificates.data import Certificate
from adaattn_core.costs import CostModel
from adaattn_core.deciding import (
    Adapted,
    Repeats,
    certificate_later,
    compiled_for,
    decides,
)
from adaattn_core.errors import UnsupportedError
from adaattn_core.escalation import Attempt, check_outcome, escalate
from adaattn_core.facts import RawResult
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.fixed import ExactPolicy
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.scores import left_out, rules_of, under_rules
from adaattn_core.stats import ProblemStats
from adaattn_core.structure import Dense

Notes = dict[str, Any]
Outcome = tuple[RawResult, Plan, Certificate, ProblemStats | None, Notes]

RAN_DENSE = "ran dense: a row sees NaN or Inf, or scores might overflow"
"""Reason in the plan of a head that ran dense whatever its structure."""


def run_pipeline(
    problem: AttentionProblem,
    backend: Backend,
    capabilities: Capabilities,
    policy: Policy | None,
    budget: ErrorBudget | None,
    costs: CostModel,
    *,
    plan: Plan | None,
    seed: int,
    layer: str,
    drawn: bool = False,
    profile: bool = False,
) -> Outcome:
    """Run the five steps; see `adaattn_core.api.attention`.

    A backend that `Decides` makes them on its device in one call; any other policy, budget or
    problem takes them one by one. `drawn` says that the seed was drawn, not given.
    """
    clock = _Clock()
    if problem.paged is not None and not capabilities.paged:
        raise UnsupportedError(
            got=f'pages on backend "{backend.name}", which takes arrays only',
            needed="a backend whose capabilities say paged",
            do='use backend="numpy", or PagedKV.gather() and pass the arrays',
        )
    if problem.paged is not None:  # what else it runs is for arrays
        capabilities = replace(capabilities, structures=capabilities.paged)
    ruled = bool(rules_of(problem))
    if ruled:
        lost = left_out(problem, capabilities)
        capabilities = under_rules(problem, capabilities, backend.name)
    reason = ""
    if ruled and budget and decides(backend):
        reason = "a softcap or sinks: planning kernels know neither"
    if budget and problem.paged is None and not ruled:
        adapted: Adapted | str = ""
        if plan is not None and isinstance(backend, Repeats):
            plan.check_fits(problem)
            adapted = backend.repeat(problem, plan, budget, profile=profile)
        elif plan is None and policy and decides(backend):
            rules = compiled_for(problem, backend, policy, budget, costs)
            given = None if drawn else seed
            adapted = (
                rules
                if isinstance(rules, str)
                else backend.adapt(problem, rules, budget, seed=given, profile=profile)
            )
        if isinstance(adapted, Adapted):
            certificate = certificate_later(problem, adapted, budget)
            if plan is not None:
                plan = replace(plan, heads=adapted.plans, seed=adapted.seed)
            else:
                plan = Plan(
                    adapted.plans, seed=adapted.seed, policy=policy.name if policy else "",
                    target=costs.name, layer=layer,
                )  # fmt: skip
            clock.lap("host_seconds")
            notes: Notes = {**clock.seconds, **adapted.notes}
            return adapted.raw, plan, certificate, ProblemStats(adapted.stats), notes
        reason = adapted
    # An exact call asks for neither stats nor samples, and the question costs host time.
    exact = budget is None and (policy is None or type(policy) is ExactPolicy)
    # What 8-bit pages were rounded from is gone: only theorems speak about a cache.
    asks = not exact and problem.paged is None
    sampler = backend if asks and isinstance(backend, Samples) else None
    measuring = backend if asks and isinstance(backend, Measures) else None
    context = PolicyContext.of(
        problem, budget, capabilities, costs,
        seed=seed, layer=layer, measures=measuring is not None,
    )  # fmt: skip
    stats: ProblemStats | None = None
    workspace = None
    if plan is None:
        assert policy is not None
        request = policy.request(context)
        if request is not None:
            if measuring is None:
                raise _measures_nothing(problem, policy, backend)
            stats, workspace = measuring.measure(problem, request)
            clock.lap("measure_seconds")
        heads = policy.decide(stats.heads if stats else {}, context)
        if reason:
            said = f"not planned on the device: {reason}"
            heads = {i: replace(h, reason=f"{h.reason}; {said}") for i, h in heads.items()}
        if ruled and lost:
            heads = {i: replace(h, reason=f"{h.reason}; {lost}") for i, h in heads.items()}
        plan = Plan(heads, seed=seed, policy=policy.name, target=costs.name, layer=layer)
    plan.check_fits(problem)
    clock.lap("plan_seconds")
    raw = backend.run(problem, plan, workspace=workspace)
    ran_dense = sorted(raw.ran_dense)
    if ran_dense:
        plan = plan.with_heads(
            {i: replace(plan[i], structure=Dense(), reason=RAN_DENSE) for i in ran_dense}
        )
    clock.lap("run_seconds")
    certifier = Certifier(problem, sampler, budget, seed)
    steps: dict[str, list[str]] = {}
    if budget is None:  # nobody waits for the verdict: a device may still be computing
        certificate = certifier.later(raw, plan)
        clock.lap("certify_seconds")
    else:
        certificate = certifier.certify(raw, plan, list(plan))
        clock.lap("certify_seconds")
        attempt = Attempt(raw, plan, certificate)
        if budget.on_violation == "escalate":

            def rerun(plan: Plan, heads: list[HeadIndex], into: RawResult) -> RawResult:
                return backend.run(problem, plan, workspace=workspace, heads=heads, into=into)

            climbing = policy or ExactPolicy()
            attempt, steps = escalate(
                attempt, budget, climbing, context, certifier, stats, rerun
            )
        clock.lap("escalate_seconds")
        raw, plan, certificate = attempt.raw, attempt.plan, attempt.certificate
        if budget.on_violation != "report":
            failing = certificate.violations(budget)
            check_outcome(
                certificate,
                budget,
                unsampled="" if sampler else backend.name,
                mask_max_abs=certifier.mask_to_blame(raw, plan, failing),
            )
    notes = {**clock.seconds, "escalated": steps}
    if reason:
        notes["planned_on_host"] = reason
    if ran_dense:
        notes["ran_dense"] = [f"{sequence},{head}" for sequence, head in ran_dense]
    return raw, plan, certificate, stats, notes


def _measures_nothing(
    problem: AttentionProblem, policy: Policy, backend: Backend
) -> UnsupportedError:
    if problem.paged is not None:
        return UnsupportedError(
            got=f'policy "{policy.name}" over pages, where nothing is measured',
            needed="a policy that asks for no measurements",
            do="leave the policy out (PagedPolicy), or use FixedPolicy",
        )
    return UnsupportedError(
        got=f'policy "{policy.name}" on backend "{backend.name}", which measures nothing',
        needed="a backend that measures, or a plan that needs none",
        do='use backend="numpy" and run its plan here, or FixedPolicy, or no budget at all',
    )


class _Clock:
    """Wall-clock seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
