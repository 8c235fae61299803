"""Masks of a sequence as tensors: what its rows see, and what is added to their scores.

An additive mask is treated as in the reference backend: the largest entry that a row sees is
taken off the whole row (softmax does not see it, the log-sum-exp gets it back); an entry so far
below it that the key's weight is certainly nothing beside the row's largest, whatever the
scores, hides the key; and where that largest entry swallows every score, the row weighs its
keys by the mask alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.problem import AttentionProblem
from adaattn_torch.backend.tensors import as_tensor

UNDERFLOW = 750.0
"""exp of less than minus this is 0 in float64, subnormal numbers included."""
ABSORBING = 2.0**70
"""A mask entry this many times larger than a score is their sum."""
SCAN_ENTRIES = 1 << 22
"""Mask entries that are looked at at once."""


@dataclass(eq=False)
class Rows:
    """What one look at the masks of a sequence tells; axes are (heads or 1, len)."""

    live: torch.Tensor
    seen_keys: torch.Tensor
    shift: torch.Tensor
    cutoff: torch.Tensor
    absorbed: torch.Tensor
    bias_max_abs: torch.Tensor
    nonfinite: torch.Tensor


@dataclass(eq=False)
class SequenceMask:
    """The masks of one sequence.

    Attributes
    ----------
    start, stop : ndarray of int64, shape (len_q,)
        Interval of keys that each row may see.
    len_kv : int
    allowed, bias : Tensor or None, shape (heads_q or 1, len_q, len_kv)
        Boolean and additive masks as the caller gave them, views.
    device : torch.device
    reach : Tensor, shape (heads_q, len_q)
        Score scale times query norm times the head's largest key norm, float64.
    value_max : float
        Largest norm of a value.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    len_kv: int
    allowed: torch.Tensor | None
    bias: torch.Tensor | None
    device: torch.device
    reach: torch.Tensor | None = None
    value_max: float = 0.0

    @classmethod
    def of(cls, problem: AttentionProblem, sequence: int, device: torch.device) -> SequenceMask:
        """Cut the problem's mask to one sequence."""
        span = problem.sequences[sequence]
        start, stop = problem.intervals(sequence)
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        allowed, bias = (
            None if x is None else _cut(as_tensor(x), problem, span.batch, rows, keys)
            for x in (problem.mask.allowed, problem.mask.bias)
        )
        return cls(start, stop, span.len_kv, allowed, bias, device)

    @property
    def structural(self) -> bool:
        """Whether every row sees an interval and nothing is added."""
        return self.allowed is None and self.bias is None

    @property
    def len_q(self) -> int:
        """Query rows."""
        return len(self.start)

    @cached_property
    def causal_square(self) -> bool:
        """Whether row i of len_kv rows sees keys 0..i."""
        return (
            self.structural
            and self.len_q == self.len_kv
            and not self.start.any()
            and bool((self.stop == np.arange(1, self.len_q + 1)).all())
        )

    @cached_property
    def visible(self) -> int:
        """Scores that the intervals leave."""
        return int((self.stop - self.start).sum())

    @cached_property
    def keys_max(self) -> int:
        """Most keys of a row, by the intervals."""
        return int((self.stop - self.start).max(initial=0))

    @cached_property
    def seen_range(self) -> tuple[int, int]:
        """First and one-past-last key that the intervals reach; they leave no gap."""
        seen = self.stop > self.start
        if not seen.any():
            return 0, 0
        return int(self.start[seen].min()), int(self.stop[seen].max())

    def cut(self, low: int, high: int) -> SequenceMask:
        """Return the masks of keys low..high-1, outside of which no interval reaches."""
        if (low, high) == (0, self.len_kv):
            return self
        start, stop = (np.clip(x - low, 0, high - low) for x in (self.start, self.stop))
        allowed, bias = (
            None if x is None else x[..., low:high] for x in (self.allowed, self.bias)
        )
        return replace(
            self, start=start, stop=stop, len_kv=high - low, allowed=allowed, bias=bias
        )

    def heads(self, chosen: list[int]) -> SequenceMask:
        """Return the masks of some query heads."""
        index = torch.tensor(chosen, device=self.device)

        def pick(x: torch.Tensor | None) -> torch.Tensor | None:
            return x if x is None or len(x) == 1 else x[index.to(x.device)]

        reach = None if self.reach is None else self.reach[index]
        return SequenceMask(
            self.start, self.stop, self.len_kv, pick(self.allowed), pick(self.bias),
            self.device, reach, self.value_max,
        )  # fmt: skip

    def rows(self, chosen: NDArray[np.int64]) -> SequenceMask:
        """Return the masks of some rows of one head."""
        index = torch.from_numpy(chosen).to(self.device)

        def pick(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[:, index]

        reach = None if self.reach is None else self.reach[:, index]
        return SequenceMask(
            self.start[chosen], self.stop[chosen], self.len_kv, pick(self.allowed),
            pick(self.bias), self.device, reach, self.value_max,
        )  # fmt: skip

    # -- tiles ---------------------------------------------------------------------------------
    def inside(self, rows: slice, low: int, high: int) -> torch.Tensor | None:
        """Whether keys low..high-1 lie in the rows' intervals, (rows, keys); None for all."""
        start, stop = self.start[rows], self.stop[rows]
        if start.max(initial=0) <= low and stop.min(initial=high) >= high:
            return None
        first, last = (torch.from_numpy(x).to(self.device)[:, None] for x in (start, stop))
        keys = torch.arange(low, high, device=self.device)
        return (keys >= first) & (keys < last)

    def seen(self, rows: slice, low: int, high: int) -> torch.Tensor | None:
        """Return what rows see, weights aside: (heads or 1, rows, keys); None for all."""
        inside = self.inside(rows, low, high)
        seen = None if inside is None else inside[None]
        if self.allowed is not None:
            part = self.allowed[:, rows, low:high]
            seen = part if seen is None else seen & part
        if self.bias is not None:
            part = self.bias[:, rows, low:high] != -math.inf
            seen = part if seen is None else seen & part
        return seen

    def addend(
        self, rows: slice, low: int, high: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return what is added to scores, -inf at hidden keys: (heads or 1, rows, keys)."""
        seen = self.seen(rows, low, high)
        if self.bias is None:
            if seen is None:
                return None
            hidden = torch.full((), -math.inf, dtype=dtype, device=self.device)
            return torch.where(seen, torch.zeros_like(hidden), hidden)
        known = self.known
        bias = self.bias[:, rows, low:high].double() - known.shift[:, rows, None]
        hidden = (self.bias[:, rows, low:high] == -math.inf) | (
            bias < known.cutoff[:, rows, None]
        )
        most = torch.finfo(dtype).max / 4
        added = bias.clamp(min=-most).to(dtype)
        if seen is not None:
            hidden = hidden | ~seen
        return added.masked_fill(hidden, -math.inf)

    @cached_property
    def visibility(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that see a key (heads or 1, len_q), and keys that a row sees, weights aside."""
        heads = max((len(x) for x in (self.allowed, self.bias) if x is not None), default=1)
        live = torch.from_numpy(self.stop > self.start).to(self.device).repeat(heads, 1)
        keys = torch.zeros(heads, self.len_kv, dtype=torch.bool, device=self.device)
        low, high = self.seen_range
        if self.structural or not (self.len_kv and self.len_q):
            keys[:, low:high] = True
            return live, keys
        step = max(SCAN_ENTRIES // max(self.len_kv * heads, 1), 1)
        for first in range(0, self.len_q, step):
            rows = slice(first, min(first + step, self.len_q))
            seen = self.seen(rows, 0, self.len_kv)
            if seen is None:
                keys[:] = True
                continue
            live[:, rows] = seen.any(dim=2)
            keys |= seen.any(dim=1)
        return live, keys

    # -- one look at all of them ---------------------------------------------------------------
    @cached_property
    def known(self) -> Rows:
        """What one look at every entry tells."""
        heads = max((len(x) for x in (self.allowed, self.bias) if x is not None), default=1)
        if self.bias is not None and self.reach is not None:
            heads = max(heads, len(self.reach))
        device, len_q = self.device, self.len_q
        live = torch.from_numpy(self.stop > self.start).to(device)
        low, high = self.seen_range
        seen_keys = torch.zeros(heads, self.len_kv, dtype=torch.bool, device=device)
        found = Rows(
            live=live.expand(heads, len_q),
            seen_keys=seen_keys,
            shift=torch.zeros(heads, len_q, dtype=torch.float64, device=device),
            cutoff=torch.full((heads, len_q), -math.inf, dtype=torch.float64, device=device),
            absorbed=torch.zeros(heads, len_q, dtype=torch.bool, device=device),
            bias_max_abs=torch.zeros(heads, dtype=torch.float64, device=device),
            nonfinite=torch.zeros(heads, dtype=torch.bool, device=device),
        )
        if self.structural or not (self.len_kv and len_q):
            seen_keys[:, low:high] = True
            return found
        found.live = torch.zeros(heads, len_q, dtype=torch.bool, device=device)
        step = max(SCAN_ENTRIES // max(self.len_kv * heads, 1), 1)
        for first in range(0, len_q, step):
            rows = slice(first, min(first + step, len_q))
            seen = self.seen(rows, 0, self.len_kv)
            if seen is None:
                seen = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
            seen = seen.expand(heads, rows.stop - rows.start, self.len_kv)
            if self.bias is not None:
                seen = self._look(found, rows, seen)
            found.live[:, rows] = seen.any(dim=2)
            seen_keys |= seen.any(dim=1)
        return found

    def _look(self, found: Rows, rows: slice, seen: torch.Tensor) -> torch.Tensor:
        """Find out about the additive mask of some rows; return what they see with weight."""
        assert self.bias is not None
        bias = self.bias[:, rows].double().expand(seen.shape)
        finite = torch.isfinite(bias) & seen
        found.nonfinite |= (seen & ~finite).any(dim=2).any(dim=1)
        top = torch.where(finite, bias, -math.inf).amax(dim=2)
        top = torch.where(top == -math.inf, 0.0, top)
        reach = top.new_zeros(()) if self.reach is None else self.reach[:, rows]
        cutoff = -(2 * reach + UNDERFLOW + math.log(max(self.value_max, 1.0)))
        cutoff = torch.nan_to_num(cutoff, nan=-math.inf, neginf=-math.inf).expand(top.shape)
        found.shift[:, rows], found.cutoff[:, rows] = top, cutoff
        absorbed = top.abs() > ABSORBING * reach
        found.absorbed[:, rows] = absorbed
        moved = bias - top[..., None]
        seen = seen & ~(moved < cutoff[..., None])
        lowest = torch.where(finite & seen, moved, 0.0).amin(dim=2)
        # A cast of an entry and the shift itself round: that counts as if twice were added.
        eps = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        lost = torch.where(absorbed, 0.0, top.abs() * eps)
        size = (2 * -lowest + lost).amax(dim=1) if rows.stop > rows.start else 0.0
        found.bias_max_abs = torch.maximum(found.bias_max_abs, torch.as_tensor(size))
        return seen


def _cut(
    x: torch.Tensor, problem: AttentionProblem, batch: int, rows: slice, keys: slice
) -> torch.Tensor:
    """Cut a mask to a sequence: (heads_q or 1, len_q, len_kv)."""
    x = x[(None,) * (4 - x.dim())]
    x = x[batch if x.shape[0] > 1 else 0]
    x = x.expand(x.shape[0], problem.len_q, problem.len_kv)
    return x[:, rows, keys]
