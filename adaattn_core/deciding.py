"""The contract of backends that plan on the device: one call, nothing waited for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol, TypeGuard, runtime_checkable

from adaattn_core.backend import Capabilities
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import Certificate, HeadCertificate
from adaattn_core.costs import CostModel
from adaattn_core.escalation import check_outcome
from adaattn_core.facts import RawResult
from adaattn_core.lazy import LazyHeads
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.compiling import compile_policy
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats

__all__ = ["Adapted", "Decides", "Repeats", "certificate_later", "compiled_for", "decides"]

_TABLES_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Adapted:
    """What a call that was planned on the device returns; nothing in it has been waited for.

    Attributes
    ----------
    raw : RawResult
    seed : int
        Of the rows that were sampled and drawn.
    plans, certificates, stats : mapping of (sequence, head)
        Read from the device when somebody looks.
    notes : mapping of str to object
        For the provenance; values may be `adaattn_core.lazy.Later`.
    """

    raw: RawResult
    seed: int
    plans: Mapping[HeadIndex, HeadPlan]
    certificates: Mapping[HeadIndex, HeadCertificate]
    stats: Mapping[HeadIndex, HeadStats]
    notes: Mapping[str, Any]


@runtime_checkable
class Decides(Protocol):
    """A backend that measures, decides, runs, certifies and escalates without the host."""

    def decides(self) -> Capabilities:
        """Return what it chooses from; `Backend.capabilities` says what it runs by a plan."""
        ...

    def adapt(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        *,
        seed: int | None,
        profile: bool = False,
    ) -> Adapted | str:
        """Do all five steps of a call by a policy's table, or say why this one is not taken.

        Parameters
        ----------
        problem : AttentionProblem
        table : DecisionTable
            Rules for heads of one shape; every sequence has it.
        budget : ErrorBudget
        seed : int or None
            Of sampled and drawn rows; None: rows that this backend drew at random and may use
            again for problems of the same sizes.
        profile : bool
            Whether ``notes["stage_ms"]`` is to hold the milliseconds of each stage.

        Returns
        -------
        Adapted, or str
            A reason: the call is then made step by step on the host.
        """
        ...


@runtime_checkable
class Repeats(Protocol):
    """A backend that runs a plan that was decided on a device once more."""

    def repeat(
        self,
        problem: AttentionProblem,
        plan: Plan,
        budget: ErrorBudget,
        *,
        profile: bool = False,
    ) -> Adapted | str:
        """Run a plan without measuring, certify it, and run heads that fail again, dense.

        The plan's seed draws the rows: the same plan gives the same bits, and those of the call
        that decided it.

        Returns
        -------
        Adapted, or str
            A reason: the plan is then run step by step.
        """
        ...


def decides(backend: object) -> TypeGuard[Decides]:
    """Whether a backend `Decides`; by hand, as asking the protocol takes 15 us of a call."""
    return hasattr(backend, "adapt") and hasattr(backend, "decides")


_tables: OrderedDict[Hashable, DecisionTable | str] = OrderedDict()
_lock = Lock()


def compiled_for(
    problem: AttentionProblem,
    backend: Decides,
    policy: Policy,
    budget: ErrorBudget,
    costs: CostModel,
) -> DecisionTable | str:
    """Return the policy's table for a problem's heads, or why there is none.

    Tables depend on sizes, not on numbers, layers or seeds: they are remembered, as compiling
    one takes longer than starting a call.
    """
    capabilities = backend.decides()
    spans = tuple((span.len_q, span.len_kv) for span in problem.sequences)
    key: Hashable = (
        policy, budget, capabilities, costs.name, problem.dtype, problem.scale, spans,
        (problem.heads_q, problem.heads_kv, problem.dim_qk, problem.dim_v), problem.mask.left,
        problem.mask.right, problem.mask.alignment, problem.mask.is_structural,
    )  # fmt: skip
    try:
        with _lock:
            found = _tables.get(key)
            if found is not None:
                _tables.move_to_end(key)
                return found
    except TypeError:  # a policy of mutable parts has no hash: it is compiled every time
        return _compiled(problem, capabilities, policy, budget, costs)
    found = _compiled(problem, capabilities, policy, budget, costs)
    with _lock:
        _tables[key] = found
        while len(_tables) > _TABLES_REMEMBERED:
            _tables.popitem(last=False)
    return found


def _compiled(
    problem: AttentionProblem,
    capabilities: Capabilities,
    policy: Policy,
    budget: ErrorBudget,
    costs: CostModel,
) -> DecisionTable | str:
    if budget.guarantee != "sampled":
        return f"guarantee {budget.guarantee}: only sampled ones are kept on the device"
    context = PolicyContext.of(
        problem, budget, capabilities, costs, seed=0, layer="", measures=True
    )
    compiled = compile_policy(policy, context)
    if compiled is None:
        return f"policy {policy.name} does not compile to a table"
    if len(compiled.tables) != 1:
        return f"{len(compiled.tables)} sizes of heads in one problem"
    return compiled.tables[0]


def certificate_later(
    problem: AttentionProblem, adapted: Adapted, budget: ErrorBudget
) -> Certificate:
    """Return the certificate of a device's call.

    It is read, and heads that miss the budget raise, when somebody looks; at once only where
    the caller asked to be stopped (``on_violation="raise"``).
    """
    shape = (len(problem.sequences), problem.heads_q)

    def checked() -> Mapping[HeadIndex, HeadCertificate]:
        found = Certificate(adapted.certificates, shape)
        check_outcome(found, budget)
        return adapted.certificates

    certificate = Certificate(LazyHeads(checked), shape)
    if budget.on_violation == "raise":
        certificate.holds(budget)
    return certificate
