"""The contract of backends that plan on the device: one call, nothing waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificate import HeadCertificate
from adaattn_core.facts import RawResult
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats

__all__ = ["Adapted", "Decides"]


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
