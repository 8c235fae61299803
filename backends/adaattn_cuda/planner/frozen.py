"""Plans that were decided before, as tables of their structures and numbers of heads."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.table import FALLBACK, Candidate, DecisionTable
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark
from adaattn_cuda.planner.levels import size_refusal
from adaattn_cuda.work.far import LEVELS_MAX

__all__ = ["Frozen", "frozen"]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A plan as the planning kernels take it.

    Attributes
    ----------
    plan : Plan
    table : DecisionTable
        Its landmark structures, each a candidate; nothing is decided by it.
    decided : tuple of int
        Candidate of every head, sequence by sequence; `FALLBACK` runs dense.
    """

    plan: Plan
    table: DecisionTable
    decided: tuple[int, ...]


def frozen(plan: Plan, problem: AttentionProblem, sizes: tuple[Landmark, ...]) -> Frozen | str:
    """Return a plan as data, or why the planning kernels do not run it."""
    dtype = problem.dtype
    heads = [plan[index] for index in problem.heads()]
    if any((head.qk, head.pv) != (dtype, dtype) for head in heads):
        return f"formats other than {dtype} in the plan"
    structures: set[Landmark] = set()
    for head in heads:
        if isinstance(head.structure, Landmark):
            structures.add(head.structure)
        elif head.structure.kind != "dense":
            return f"structure {head.structure.kind} in the plan"
    unlike = size_refusal(structures, sizes)
    if unlike:
        return unlike
    if len(structures) > LEVELS_MAX:
        return f"{len(structures)} landmark masses in one plan: at most {LEVELS_MAX}"
    ladder = sorted(structures, key=lambda structure: structure.tau)
    plans = [HeadPlan(structure=structure, qk=dtype, pv=dtype) for structure in ladder]
    table = DecisionTable(
        tuple(Candidate(one, fixed=0.0, slope=1.0) for one in plans),
        HeadPlan(qk=dtype, pv=dtype),
        aim=0.0,
        escalation_aim=0.0,
        worthwhile=0.0,
    )
    number = {structure: k for k, structure in enumerate(ladder)}
    decided = (
        number[head.structure] if isinstance(head.structure, Landmark) else FALLBACK
        for head in heads
    )
    return Frozen(plan, table, tuple(decided))
