"""Compiling policies to decision tables: one table for each shape of head in a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adaattn_core.errors import ArgumentError
from adaattn_core.plan import HeadPlan
from adaattn_core.policies import fitting
from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.table import (
    FORMAT_CODES,
    KINDS,
    MAX_CANDIDATES,
    Candidate,
    DecisionTable,
    knob,
)
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats
from adaattn_core.structure import LowRank

RULES = ("request", "decide", "decide_head", "escalate")
"""Methods that a compiled table stands for."""


@runtime_checkable
class CompilesToTable(Protocol):
    """A policy that a device can apply."""

    def compile(self, context: PolicyContext) -> DecisionTable | None:
        """Return the policy as data for the heads of one shape.

        Parameters
        ----------
        context : PolicyContext
            All of its shapes are alike. Its seed and layer say nothing: a table is kept and
            serves every call of these sizes.

        Returns
        -------
        DecisionTable or None
            None where the policy does not fit a table under this budget and on this backend:
            it is then asked on the host.
        """
        ...


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """Tables of a problem's heads.

    Attributes
    ----------
    tables : tuple of DecisionTable
        One for each shape of head.
    table_of_sequence : ndarray of int32, shape (sequences,)
        Which of them serves a sequence's heads.
    """

    tables: tuple[DecisionTable, ...]
    table_of_sequence: NDArray[np.int32]

    @property
    def measured(self) -> bool:
        """Whether any head must be measured."""
        return any(table.measured and table.candidates for table in self.tables)


def compile_policy(policy: Policy, context: PolicyContext) -> CompiledPolicy | None:
    """Compile a policy for every shape of head in a problem.

    Returns
    -------
    CompiledPolicy or None
        None where the policy cannot be compiled, or where a class overrides one of `RULES`
        but not `compile`: the inherited table would then not be what it decides.
    """
    if not isinstance(policy, CompilesToTable) or not _compiles_its_own_rules(type(policy)):
        return None
    by_shape: dict[tuple[int, ...], list[HeadIndex]] = {}
    for index, shape in context.shapes.items():
        by_shape.setdefault(_key(shape), []).append(index)
    tables: list[DecisionTable] = []
    sequences = 1 + max((s for s, _ in context.shapes), default=-1)
    table_of_sequence = np.zeros(sequences, np.int32)
    for indices in by_shape.values():
        part = replace(context, shapes={i: context.shapes[i] for i in indices})
        table = policy.compile(part)
        if table is None:
            return None
        table_of_sequence[[s for s, _ in indices]] = len(tables)
        tables.append(table)
    return CompiledPolicy(tuple(tables), table_of_sequence)


def one_shape(context: PolicyContext) -> HeadStats:
    """Return the shape that all heads of a context share.

    Raises
    ------
    ArgumentError
        If there is none, or more than one.
    """
    shapes = {_key(shape): shape for shape in context.shapes.values()}
    if len(shapes) != 1:
        raise ArgumentError(
            got=f"a context with {len(shapes)} shapes of heads",
            needed="heads of one shape: costs depend on it",
            do="use adaattn_core.policies.compile_policy",
        )
    return next(iter(shapes.values()))


def priced(plan: HeadPlan, context: PolicyContext, **limits: float) -> Candidate:
    """Return a candidate with the context's costs, relative to dense at the exact format.

    A cost model's time is a convex function of the share; the line through its ends, which a
    table holds, is an upper bound of it.
    """
    shape, costs = one_shape(context), context.costs
    dense = costs.dense_cost(shape, context.exact_format, context.exact_format)
    none, whole = (_relative(costs.head_cost(shape, plan, x), dense) for x in (0.0, 1.0))
    return Candidate(plan, fixed=none, slope=whole - none, **limits)


def dense_fallback(context: PolicyContext) -> HeadPlan:
    """Dense at the inputs' own precision; its cost is relative to dense f32, as plans' are."""
    exact = context.exact_format
    shape, costs = one_shape(context), context.costs
    ratio = _relative(costs.dense_cost(shape, exact, exact), costs.dense_cost(shape))
    return HeadPlan(qk=exact, pv=exact, cost_estimate=ratio)


def _relative(cost: float, dense: float) -> float:
    """Ratio of two costs; where a head without rows or keys costs nothing, nothing saves."""
    return cost / dense if dense > 0 else 1.0


def worth_measuring(
    candidates: Iterable[Candidate],
    context: PolicyContext,
    worthwhile: float,
    usual_share: float = 0.0,
) -> tuple[Candidate, ...]:
    """Those that could be cheap enough, from the safest to the cheapest.

    A structure is taken to keep `usual_share`, or more where it cannot keep so little, and to
    bear its part of the time that measuring takes whatever is found. So where measuring would
    not pay on usual heads the table is empty and nothing is measured.

    Where they are more than a table holds, reduced formats of dense heads go first.
    """
    shape, costs, exact = one_shape(context), context.costs, context.exact_format
    dense_seconds = costs.dense_cost(shape, exact, exact) * len(context.shapes)
    call = costs.call_seconds / max(dense_seconds, 1e-30)

    def cost(c: Candidate) -> float:
        if c.plan.structure.kind == "dense":
            return c.fixed + c.slope
        share = max(fitting.least_share(c.plan.structure, shape), usual_share)
        return c.fixed + call + c.slope * share

    able = [c for c in candidates if cost(c) < worthwhile]
    able.sort(key=_danger)
    dense = [c for c in able if c.plan.structure.kind == "dense"]
    rest = [c for c in able if c.plan.structure.kind != "dense"]
    return (*dense[: max(MAX_CANDIDATES - len(rest), 0)], *rest)


def _danger(candidate: Candidate) -> tuple[float, ...]:
    """Sort key: structures from the safest, then formats, then what is left out."""
    plan = candidate.plan
    left_out = knob(plan.structure)
    if isinstance(plan.structure, LowRank):
        left_out = -left_out
    formats = FORMAT_CODES[plan.qk], FORMAT_CODES[plan.pv]
    return (KINDS[plan.structure.kind], *formats, left_out)


def _key(shape: HeadStats) -> tuple[int, ...]:
    return shape.len_q, shape.len_kv, shape.dim_qk, shape.dim_v, shape.visible


def _compiles_its_own_rules(cls: type) -> bool:
    """Whether no rule was overridden by a class further down than the one that compiles."""
    order = cls.__mro__

    def depth(name: str) -> int:
        return next((i for i, c in enumerate(order) if name in vars(c)), len(order))

    return all(depth(rule) >= depth("compile") for rule in RULES)
