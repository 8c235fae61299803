"""What the planning kernels take for levels: landmarks of one of their sizes, nested by tau."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from adaattn_core.policies.table import DecisionTable
from adaattn_core.structure import Landmark, Structure

__all__ = ["size_refusal", "table_refusal"]


def size_refusal(structures: Collection[Structure], sizes: tuple[Landmark, ...]) -> str:
    """Why structures differ in more than tau or have other sizes; empty if they do not."""
    others = {structure.kind for structure in structures} - {"landmark"}
    if others:
        return f"structures {sorted(others)}"
    like = sizes[0].tau
    shapes = {replace(s, tau=like) for s in structures if isinstance(s, Landmark)}
    if len(shapes) > 1 or not shapes <= {replace(size, tau=like) for size in sizes}:
        return "landmarks of other sizes than the planning kernels run"
    return ""


def table_refusal(table: DecisionTable, dtype: str, sizes: tuple[Landmark, ...]) -> str:
    """Why a table's candidates are no levels as the kernels number them; empty if they are.

    Level 0 has the most landmarks, and each further one fewer of them: a judged tile's rows
    are shared in this order, and a table in another one would be judged by other landmarks.
    """
    plans = [candidate.plan for candidate in table.candidates]
    formats = {name for plan in (*plans, table.fallback) for name in (plan.qk, plan.pv)}
    if formats - {dtype}:
        return f"formats {sorted(formats - {dtype})} in the policy's table"
    found = size_refusal([plan.structure for plan in plans], sizes)
    taus = [p.structure.tau for p in plans if isinstance(p.structure, Landmark)]
    if not found and taus != sorted(taus):
        return "a policy's table whose landmarks do not go from the most to the fewest"
    return found
