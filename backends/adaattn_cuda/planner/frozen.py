"""Plans that were decided before, as tables of their structures and numbers of heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.table import FALLBACK, Candidate, DecisionTable
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark
from adaattn_cuda.planner.levels import size_refusal
from adaattn_cuda.work.far import LEVELS_MAX, WIDE

__all__ = ["Frozen", "frozen"]

_E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Frozen:
    """A plan as the planning kernels take it.

    Attributes
    ----------
    plan : Plan
    table : DecisionTable
        Its landmark structures, each a candidate; nothing is decided by it.
    decided : tuple of int
        Candidate of every head, sequence by sequence; `FALLBACK` runs dense, in 8 bits where
        some heads do, `WIDE` then in 16.
    """

    plan: Plan
    table: DecisionTable
    decided: tuple[int, ...]


def frozen(plan: Plan, problem: AttentionProblem, sizes: tuple[Landmark, ...]) -> Frozen | str:
    """Return a plan as data, or why the planning kernels do not run it."""
    dtype = problem.dtype
    heads = [plan[index] for index in problem.heads()]
    narrow_heads = [h for h in heads if h.structure.kind == "dense" and h.qk == "i8"]
    narrow = {
        replace(head, reason="", cost_estimate=1.0, error_estimate=0.0) for head in narrow_heads
    }
    others = [head for head in heads if head.structure.kind != "dense" or head.qk != "i8"]
    if any((head.qk, head.pv) != (dtype, dtype) for head in others):
        return f"formats other than {dtype} in the plan"
    if len(narrow) > 1:
        return "8-bit heads of several kinds in the plan"
    if any(not _runs(head, dtype) for head in narrow):
        return "8-bit heads with other scales, rounding or formats than the device's"
    structures: set[Landmark] = set()
    for head in heads:
        if isinstance(head.structure, Landmark):
            structures.add(head.structure)
        elif head.structure.kind != "dense":
            return f"structure {head.structure.kind} in the plan"
    if narrow and not structures and len(narrow_heads) < len(heads):
        return "dense heads in 8 and in 16 bits and no landmarks in the plan"
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
        narrow=next(iter(narrow), None),
    )
    number = {structure: k for k, structure in enumerate(ladder)}
    decided = (
        number[head.structure]
        if isinstance(head.structure, Landmark)
        else FALLBACK
        if head.qk == "i8" or not narrow
        else WIDE
        for head in heads
    )
    return Frozen(plan, table, tuple(decided))


def _runs(head: HeadPlan, dtype: str) -> bool:
    """Whether the planning kernels run a dense head of 8 bits as it says."""
    fixed = HeadPlan()
    names = ("scales", "rounding", "flush_keys")
    return (
        head.pv in ("e4m3", dtype)
        and head.p_scale <= _E4M3_MAX
        and all(getattr(head, name) == getattr(fixed, name) for name in names)
    )
