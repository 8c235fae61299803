"""What a backward kernel is asked to compute, described without a device."""

from __future__ import annotations

from dataclasses import dataclass

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.work.geometry import Geometry

__all__ = ["POINTERS", "BackwardTask"]

POINTERS = (
    "query", "key", "value", "out", "lse", "grad_out", "grad_lse",
    "d_query", "d_key", "d_value", "allowed", "bias", "d_bias", "workspace", "sinks", "d_sinks",
)  # fmt: skip
"""What a backward launch is told when it starts: an address each, 0 for none."""


@dataclass(frozen=True, slots=True)
class BackwardTask:
    """The gradients of exact attention of all heads.

    Attributes
    ----------
    query, key, value, out, grad_out : ArrayView
        (batch, heads, len, dim); last stride 1.
    lse : ArrayView
        f32, (batch, heads_q, len_q), contiguous; so is the gradient of it, where there is one,
        and so are the gradients that are written.
    allowed, bias, d_bias : ArrayView or None
        Masks of four dimensions with stride 0 where they are broadcast; `d_bias` is f32 and
        added to.
    sequences : tuple of SequenceSpan
    left, right : int or None
    bottom_right : bool
    scale : float
    deterministic : bool
        Whether every start must give the same bits.
    sinks : ArrayView or None
        f32, contiguous, one to a query head; `lse` counts them.
    softcap : float
        0 for none.
    """

    query: ArrayView
    key: ArrayView
    value: ArrayView
    out: ArrayView
    lse: ArrayView
    grad_out: ArrayView
    allowed: ArrayView | None
    bias: ArrayView | None
    d_bias: ArrayView | None
    sequences: tuple[SequenceSpan, ...]
    left: int | None
    right: int | None
    bottom_right: bool
    scale: float
    deterministic: bool
    sinks: ArrayView | None = None
    softcap: float = 0.0

    @classmethod
    def of(
        cls,
        problem: AttentionProblem,
        arrays: tuple[ArrayView, ...],
        masks: tuple[ArrayView | None, ArrayView | None, ArrayView | None],
        deterministic: bool,
        sinks: ArrayView | None = None,
    ) -> BackwardTask:
        """Describe a checked problem with its query, key, value, out, lse and grad_out."""
        mask = problem.mask
        query, key, value, out, lse, grad_out = arrays
        return cls(
            query, key, value, out, lse, grad_out, *masks, problem.sequences,
            mask.left, mask.right, mask.alignment == "bottom_right", problem.scale,
            deterministic, sinks, problem.softcap or 0.0,
        )  # fmt: skip

    @property
    def softcap_rate(self) -> float:
        """What scores are multiplied by before the tanh of a softcap."""
        return self.scale / self.softcap if self.softcap else 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether every sequence fills its batch entry: no row or key belongs to nobody."""
        len_q, len_kv = self.query.shape[2], self.key.shape[2]
        return all(
            s.index == s.batch and s.len_q == len_q and s.len_kv == len_kv
            for s in self.sequences
        )

    @property
    def geometry(self) -> Geometry:
        """What decides a work list."""
        return Geometry(
            self.sequences, self.query.shape[1], self.key.shape[1], self.query.shape[3],
            self.value.shape[3], self.bottom_right, self.left, self.right,
        )  # fmt: skip
