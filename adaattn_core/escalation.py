"""After the certificate: heads that miss the budget climb, and what still misses it is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.certifier import Certifier
from adaattn_core.certificates.data import Certificate
from adaattn_core.errors import BudgetInfeasibleError, CertificateViolation
from adaattn_core.facts import RawResult
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import ProblemStats

DO_ESCALATE = 'loosen the budget, or use on_violation="escalate"'


@dataclass(frozen=True, slots=True)
class Attempt:
    """A plan, what running it gave, and what is certified of that."""

    raw: RawResult
    plan: Plan
    certificate: Certificate


Rerun = Callable[[Plan, list[HeadIndex], RawResult], RawResult]
"""Runs some heads of a plan anew into an earlier result."""


def escalate(
    attempt: Attempt,
    budget: ErrorBudget,
    policy: Policy,
    context: PolicyContext,
    certifier: Certifier,
    stats: ProblemStats | None,
    rerun: Rerun,
) -> tuple[Attempt, dict[str, list[str]]]:
    """Run heads that miss the budget again by safer plans, until they keep it or none is left.

    Returns
    -------
    attempt : Attempt
        The last one.
    steps : mapping of "sequence,head" to list of str
        The plans that a head climbed through, in words.
    """
    steps: dict[str, list[str]] = {}
    while failing := attempt.certificate.violations(budget):
        changed: dict[HeadIndex, HeadPlan] = {}
        for index in failing:
            known = stats.heads[index] if stats else context.shapes[index]
            upper = attempt.certificate[index].upper
            step = policy.escalate(attempt.plan[index], upper, known, context)
            while certifier.exhausted(index) and step and step.structure.kind != "dense":
                step = policy.escalate(step, upper, known, context)
            if step is not None:
                changed[index] = step
                words = f"{step.structure.kind} {step.qk}/{step.pv}"
                steps.setdefault(f"{index[0]},{index[1]}", []).append(words)
        if not changed:
            break
        plan = attempt.plan.with_heads(changed)
        raw = rerun(plan, list(changed), attempt.raw)
        newer = certifier.certify(raw, plan, list(changed))
        attempt = Attempt(raw, plan, attempt.certificate.merge(newer))
    return attempt, steps


def check_outcome(
    certificate: Certificate,
    budget: ErrorBudget,
    *,
    unsampled: str = "",
    mask_max_abs: float | None = None,
) -> None:
    """Raise what the caller asked for if heads still miss the budget.

    Parameters
    ----------
    unsampled : str
        Name of the backend where that samples no rows.
    mask_max_abs : float, optional
        Size of the additive mask where that is to blame.

    Raises
    ------
    CertificateViolation
        Under ``on_violation="raise"``.
    BudgetInfeasibleError
        Under ``on_violation="escalate"``.
    """
    failing = [i for i in certificate.violations(budget) if not certificate[i].nonfinite]
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
    if unsampled and budget.guarantee == "sampled":
        got += f', from backend "{unsampled}", which samples no rows'
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
