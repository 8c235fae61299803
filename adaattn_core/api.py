"""attention(): the one door."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from adaattn_core.arrays import in_library_of, move_axis_layout
from adaattn_core.backend import BACKEND_PARTS, Backend, Capabilities
from adaattn_core.budget import ErrorBudget, as_budget
from adaattn_core.checks import shown, truth, whole, word
from adaattn_core.costs import get_cost_model
from adaattn_core.errors import ArgumentError
from adaattn_core.lazy import LazyNotes
from adaattn_core.mask import Mask
from adaattn_core.pipeline import run_pipeline
from adaattn_core.plan import SEED_MAX, HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend, get_policy
from adaattn_core.policies.base import Policy
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_core.policies.fixed import ExactPolicy, FixedPolicy
from adaattn_core.policies.paged import PagedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.scores import rules_of


def attention(
    query: Any,
    key: Any,
    value: Any = None,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    budget: ErrorBudget | float | None = None,
    policy: Policy | str | None = None,
    plan: Plan | None = None,
    backend: Backend | str = "auto",
    target: str | None = None,
    layout: str = "bhsd",
    seed: int | None = None,
    layer: str = "",
    profile: bool = False,
) -> AttentionResult:
    """Attention to a stated tolerance, with a certificate of its error.

    Parameters
    ----------
    query : array, shape (batch, heads_q, len_q, dim_qk)
    key : array, shape (batch, heads_kv, len_kv, dim_qk)
    value : array, shape (batch, heads_kv, len_kv, dim_v)
        Any library that speaks DLPack or the array API; f64, f32, f16 or bf16, all three alike.
        heads_q must be a multiple of heads_kv. Or `key` is a `PagedKV` and `value` left out.
    mask : Mask, optional
        Default: every key is visible.
    scale : float, optional
        Factor on the scores; default 1/sqrt(dim_qk).
    softcap : float, optional
        Scores become ``softcap * tanh(scale * q.k / softcap)`` before the mask, as in Gemma-2.
        Default: none.
    sinks : array, optional, shape (heads_q,)
        One more logit per query head in every row's denominator (gpt-oss): not scaled, without
        key or value. The returned lse counts it. Default: none.
    budget : ErrorBudget or float, optional
        Tolerated error; a float is ``ErrorBudget(rel=budget)``. None asks for exact attention
        in the input's own format.
    policy : Policy or str, optional
        Default `BudgetPolicy` (`PagedPolicy` over pages); or the name of an installed policy.
    plan : Plan, optional
        Run this plan and decide nothing. A budget is then what its certificate is held against;
        with ``on_violation="escalate"`` (the default of a budget) heads that miss it climb on.
    backend : Backend or str
        A backend, its name, or ``"auto"``: the first that takes arrays from where these live
        and runs the formats and structures that `plan` (or a policy that fixes them) names. A
        `target` other than a backend's own asks for one that emulates.
    target : str, optional
        Plan for another machine (a name in `adaattn_core.costs`) and run its formats here, by
        emulation. Default: the backend's own.
    layout : {"bhsd", "bshd"}
        Axis order of the three arrays and of the output.
    seed : int, optional
        Seed of probe rows and random rounding, recorded in the plan. Certificate rows are drawn
        from it too; give it only for reproducible experiments, since a sampled guarantee is a
        statement about rows that could not be foreseen. Default: fresh randomness.
    layer : str
        Name under which the plan is kept.
    profile : bool
        Whether a backend that plans on its device measures the milliseconds of each stage:
        ``provenance["stage_ms"]``. Reading them waits for the device. Other backends time their
        steps in any case, on the host: ``provenance["run_seconds"]`` and the like.

    Returns
    -------
    AttentionResult

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        If the arguments do not fit together.
    UnsupportedError
        If the backend does not do what is asked; nothing is ever ignored.
    BackendUnavailableError
        If no backend takes these arrays.
    CertificateViolation
        If ``budget.on_violation == "raise"`` and a head misses it.
    BudgetInfeasibleError
        If escalation reached the most accurate plan and a head still misses the budget.

    Notes
    -----
    Several threads may call at once. On the CPU a call with a seed gives the same bits whatever
    other calls run beside it and however many threads share its heads (on the same machine and
    libraries): every product is computed by one BLAS thread. While any call runs, BLAS is held
    to one thread for the whole process; the last call to leave restores what it found.

    Examples
    --------
    >>> import numpy as np
    >>> from adaattn_core import ErrorBudget, Mask, attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 2, 64, 16), dtype=np.float32) for _ in range(3))
    >>> result = attention(q, k, v, mask=Mask.causal(), budget=ErrorBudget(rel=0.1))
    >>> result.certificate.upper.shape, bool((result.certificate.upper <= 0.1).all())
    ((1, 2), True)
    """
    started = time.perf_counter()
    problem = AttentionProblem.from_arrays(
        query, key, value, mask=mask, scale=scale, layout=layout, softcap=softcap, sinks=sinks
    )
    asked = as_budget(budget)
    if plan is not None and policy is not None:
        raise ArgumentError(
            got="both a plan and a policy",
            needed="one of the two: a plan leaves nothing to decide",
            do="drop one of them",
        )
    if plan is not None and not isinstance(plan, Plan):
        raise ArgumentError(
            got=f"plan={shown(plan)}",
            needed="a Plan",
            do="read a saved one with Plan.load(path)",
        )
    deciding = _policy(policy, asked, plan, problem.paged is not None)
    word("layer", layer)
    truth("profile", profile)
    drawn = seed is None
    seed = secrets.randbits(48) if seed is None else whole("seed", seed, 0, SEED_MAX)
    costs = None if target is None else get_cost_model(target)
    chosen = _backend(backend, problem, plan, deciding, target)
    capabilities = chosen.capabilities()
    if costs is None:
        costs = capabilities.costs.get(problem.device) or get_cost_model(capabilities.target)
    raw, final, certificate, stats, notes = run_pipeline(
        problem, chosen, capabilities, deciding, asked, costs,
        plan=plan, seed=seed, layer=layer, drawn=drawn, profile=profile,
    )  # fmt: skip
    provenance: Mapping[str, Any] = LazyNotes({
        "backend": chosen.name,
        **chosen.provenance(),
        "policy": final.policy,
        "target": costs.name,
        "seed": final.seed if plan is None else seed,
        "seconds": time.perf_counter() - started,
        **notes,
    })  # fmt: skip
    return AttentionResult(
        out=move_axis_layout(in_library_of(query, raw.out), layout),
        lse=in_library_of(query, raw.lse, keep_dtype=False),
        plan=final,
        certificate=certificate,
        provenance=provenance,
        stats=stats,
        facts=raw.facts,  # not copied: reading some backends' facts waits for a device
    )


def _plans_of(policy: Policy | None) -> list[HeadPlan]:
    """Heads' plans that a policy has before it sees a problem."""
    if isinstance(policy, CalibratedPolicy):
        return [head for plan in policy.plans.values() for head in plan.heads.values()]
    if isinstance(policy, FixedPolicy) and not isinstance(policy, ExactPolicy):
        return [policy.plan]
    return []


@cache
def _default_policy() -> Policy:
    """Return one policy for all calls: it is checked when made, and knows no call."""
    return BudgetPolicy()


def _policy(
    policy: Any, budget: ErrorBudget | None, plan: Plan | None, paged: bool
) -> Policy | None:
    if plan is not None:
        return None
    if policy is None and budget is not None:
        return PagedPolicy() if paged else _default_policy()
    if policy is None:
        return ExactPolicy()
    chosen = get_policy(policy) if isinstance(policy, str) else policy
    if isinstance(chosen, type) or not isinstance(chosen, Policy):
        raise ArgumentError(
            got=f"policy={shown(policy)}",
            needed="a policy's name, or an object with request, decide and escalate",
            do='e.g. policy="entropy" or policy=FixedPolicy(qk="f16", pv="f16")',
        )
    return chosen


def _backend(
    backend: Any,
    problem: AttentionProblem,
    plan: Plan | None,
    policy: Policy | None,
    target: str | None,
) -> Backend:
    serves, paged, rules = None, problem.paged is not None, rules_of(problem)
    if isinstance(backend, str) and backend == "auto":
        heads = list(plan.heads.values()) if plan is not None else _plans_of(policy)
        if heads or paged or rules or target is not None:
            serves = partial(_serves, heads=heads, target=target, paged=paged, rules=rules)
    chosen: Backend = (
        get_backend(backend, problem.device, serves) if isinstance(backend, str) else backend
    )
    # By hand: asking a protocol costs 30 us, more than a short launch.
    if isinstance(chosen, type) or not all(hasattr(chosen, part) for part in BACKEND_PARTS):
        raise ArgumentError(
            got=f"backend={shown(backend)}",
            needed="a backend's name, or what get_backend returns",
            do='use backend="auto", or see `adaattn backends`',
        )
    return chosen


def _serves(
    can: Capabilities,
    heads: list[HeadPlan],
    target: str | None,
    paged: bool,
    rules: tuple[str, ...],
) -> bool:
    """Whether a backend runs these plans; those for another machine it must emulate."""
    if target is not None and target != can.target and not can.emulated_formats:
        return False
    if not set(rules) <= {name for name, _ in can.rules}:
        return False
    return (can.paged or not paged) and all(
        head.qk in can.qk_formats
        and head.pv in can.pv_formats
        and head.structure.kind in can.structures
        for head in heads
    )
