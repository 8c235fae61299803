"""Heads of a plan by how they run, and what is not run here."""

from __future__ import annotations

from collections.abc import Collection

from adaattn_core.errors import UnsupportedError
from adaattn_core.formats import get_format
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import HeadIndex
from adaattn_core.structure import BlockSparse
from adaattn_cuda.kernels.task import BlockHeads, Recipe
from adaattn_cuda.recent import Recent

__all__ = ["STRUCTURES", "Groups", "HeadGroups"]

_PLANS_REMEMBERED = 32
STRUCTURES = ("dense", "block_sparse", "landmark")
Groups = dict[Recipe, tuple[HeadIndex, ...] | None]
"""How -> the heads that run so; None stands for all of them."""
FLUSH_KEYS = 256
"""Keys after which 8-bit kernels add partial sums of P V to float32."""


class HeadGroups:
    """The groups of plans; those of a whole plan are remembered while it is used again."""

    def __init__(self) -> None:
        self._groups: Recent[tuple[Plan, Groups]] = Recent(_PLANS_REMEMBERED)
        self._blocks: Recent[BlockHeads] = Recent(_PLANS_REMEMBERED)

    def of_plan(self, plan: Plan) -> Groups:
        """Return the groups of a plan, remembered for as long as the plan is used again."""
        known = self._groups.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        groups = self.of_heads(plan, plan.heads)
        if len(groups) == 1 and not any(r.blocks or r.sampled for r in groups):
            groups = dict.fromkeys(groups)
        self._groups.put(id(plan), (plan, groups))
        return groups

    def of_heads(self, plan: Plan, heads: Collection[HeadIndex]) -> Groups:
        """Heads by how they run; raises for what is not done here."""
        groups: dict[Recipe, list[HeadIndex]] = {}
        given: dict[Recipe, dict[HeadIndex, BlockSparse]] = {}
        for index in heads:
            head: HeadPlan = plan[index]
            structure = head.structure
            if isinstance(structure, BlockSparse) and structure.blocks is not None:
                given.setdefault(_recipe(head), {})[index] = structure
            elif structure.kind in STRUCTURES:
                recipe = _recipe(head)._replace(sampled=structure.kind != "dense")
                groups.setdefault(recipe, []).append(index)
            else:
                raise UnsupportedError(
                    got=f"structure {structure.kind} for sequence {index[0]}, head {index[1]}",
                    needed=f"one of {', '.join(STRUCTURES)} on the GPU",
                    do='plan with FixedPolicy(Dense(), ...), or use backend="numpy"',
                    structure=structure.kind,
                )
        found: Groups = {recipe: tuple(chosen) for recipe, chosen in groups.items()}
        for recipe, of in given.items():
            found[recipe._replace(blocks=self._same_blocks(of))] = tuple(of)
        return found

    def _same_blocks(self, of: dict[HeadIndex, BlockSparse]) -> BlockHeads:
        """Return blocks as one object, the same for equal ones while it is remembered."""
        number = {id(structure): n for n, structure in enumerate(of.values())}
        unique = {number[id(structure)]: structure for structure in of.values()}
        key = (tuple(unique.items()), tuple((i, number[id(s)]) for i, s in of.items()))
        known = self._blocks.get(key)
        if known is None:
            known = BlockHeads(of)
            self._blocks.put(key, known)
        return known


def _recipe(head: HeadPlan) -> Recipe:
    """Return what a kernel must know; of fields that a format does not use, the default."""
    plain = Recipe(head.qk, head.pv)
    if not (get_format(head.qk).is_quantised or get_format(head.pv).is_quantised):
        return plain
    wanted = (("scales", "tile"), ("rounding", "nearest"), ("flush_keys", FLUSH_KEYS))
    for name, offered in wanted:
        if getattr(head, name) != offered:
            raise UnsupportedError(
                got=f"{name}={getattr(head, name)!r} with formats {head.qk}, {head.pv}",
                needed=f"{name}={offered!r} in 8 bits on the GPU",
                do='leave it out, or use backend="numpy"',
            )
    if head.p_scale > get_format("e4m3").max_finite:
        raise UnsupportedError(
            got=f"p_scale={head.p_scale:g}",
            needed="at most 448: larger weights would all become e4m3's largest number",
            do='leave it out, or use backend="numpy"',
        )
    return plain._replace(
        smooth_k=head.smooth_k if head.qk == "i8" else plain.smooth_k,
        p_scale=head.p_scale if head.pv == "e4m3" else plain.p_scale,
    )
