"""What a kernel is asked to compute, described without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from adaattn_core.problem import AttentionProblem, HeadIndex, SequenceSpan
from adaattn_core.structure import BlockSparse
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.spec import PLAIN, SINKS, SOFTCAP
from adaattn_cuda.work.geometry import Geometry

__all__ = ["Arrays", "BlockHeads", "Recipe", "Task", "addresses"]

Arrays = tuple[
    ArrayView, ArrayView, ArrayView, ArrayView, ArrayView, ArrayView | None, ArrayView | None
]
"""query, key, value, out, lse, boolean mask, additive mask."""


def addresses(arrays: Arrays, sinks: ArrayView | None = None) -> tuple[int, ...]:
    """Return what `Launch.start` takes: where each array is, 0 for none; sinks last, if any."""
    found = tuple(array.pointer if array else 0 for array in arrays)
    return found if sinks is None else (*found, sinks.pointer)


@dataclass(frozen=True, slots=True, eq=False)
class BlockHeads:
    """Given blocks of some heads; known by identity, since lists may be long.

    Attributes
    ----------
    of : mapping of (sequence, head) to BlockSparse
        Each with `blocks`.
    """

    of: Mapping[HeadIndex, BlockSparse]


class Recipe(NamedTuple):
    """What a kernel must know of a head's plan.

    Attributes
    ----------
    qk, pv : str
        Operand formats.
    smooth_k : bool
        Whether keys are centred before they are rounded to 8 bits.
    p_scale : float
        Factor on weights in [0, 1] before they are rounded to 8 bits.
    blocks : BlockHeads or None
        Blocks of keys that the heads attend to; None: every key.
    sampled : bool
        Whether the heads' structures are chosen from sampled rows first.
    """

    qk: str
    pv: str
    smooth_k: bool = True
    p_scale: float = 448.0
    blocks: BlockHeads | None = None
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """Dense attention of some heads, all in the same way.

    Attributes
    ----------
    query, key, value, out : ArrayView
        (batch, heads, len, dim); last stride 1.
    lse : ArrayView
        f32, (batch, heads_q, len_q), last stride 1.
    allowed, bias : ArrayView or None
        Masks of four dimensions with stride 0 where they are broadcast.
    sequences : tuple of SequenceSpan
    left, right : int or None
    bottom_right : bool
    scale : float
    qk, pv : str
        Operand formats.
    heads : tuple of (sequence, head) or None
        Which to compute; None is all.
    softcap : float
        Scaled scores are capped to ``softcap * tanh(score / softcap)``; 0 for not at all.
    sinks : ArrayView or None
        f32, (heads_q,), contiguous: one more logit in the denominator of each head's rows.
    smooth_k, p_scale
        As in `Recipe`; of 8-bit operands.
    """

    query: ArrayView
    key: ArrayView
    value: ArrayView
    out: ArrayView
    lse: ArrayView
    allowed: ArrayView | None
    bias: ArrayView | None
    sequences: tuple[SequenceSpan, ...]
    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    qk: str
    pv: str
    heads: tuple[HeadIndex, ...] | None = None
    softcap: float = 0.0
    sinks: ArrayView | None = None
    smooth_k: bool = True
    p_scale: float = 448.0

    @classmethod
    def of(
        cls,
        problem: AttentionProblem,
        arrays: Arrays,
        recipe: Recipe | tuple[str, str],
        heads: tuple[HeadIndex, ...] | None,
        sinks: ArrayView | None = None,
    ) -> Task:
        """Describe heads of a checked problem that are computed in one way."""
        mask, recipe = problem.mask, Recipe(*recipe)
        return cls(
            *arrays, problem.sequences, mask.left, mask.right,
            mask.alignment == "bottom_right", problem.scale, recipe.qk, recipe.pv, heads,
            problem.softcap or 0.0, sinks, recipe.smooth_k, recipe.p_scale,
        )  # fmt: skip

    @property
    def rule(self) -> int:
        """Bits of the score rule that a kernel must know."""
        return (SOFTCAP if self.softcap else PLAIN) | (SINKS if self.sinks else PLAIN)

    @property
    def factor(self) -> float:
        """What scales scores as the rule leaves them: a softcap leaves numbers below 1."""
        return self.softcap or self.scale

    @property
    def softcap_rate(self) -> float:
        """What scales the argument of the softcap's tanh; 0 without one."""
        return self.scale / self.softcap if self.softcap else 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether every sequence fills its batch entry, so that no work list is needed."""
        len_q, len_kv = self.query.shape[2], self.key.shape[2]
        return self.heads is None and all(
            s.index == s.batch and s.len_q == len_q and s.len_kv == len_kv
            for s in self.sequences
        )

    @property
    def geometry(self) -> Geometry:
        """What decides a work list."""
        return Geometry(
            self.sequences, self.query.shape[1], self.key.shape[1], self.query.shape[3],
            self.value.shape[3], self.bottom_right, self.left, self.right, self.heads,
        )  # fmt: skip
