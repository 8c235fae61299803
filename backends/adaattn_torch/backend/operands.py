"""Operands of a sequence's heads in a format, and upper bounds of their sizes.

Norms are computed in the operands' own precision with all heads at once, and raised by what
that computation may have lost. Where squares could leave the range of the format, rows are
divided by a power of two first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from adaattn_core.formats import get_format
from adaattn_torch.backend.tensors import DTYPES

_SAFE = {torch.float32: (1e-15, 1e15), torch.float64: (1e-145, 1e145)}
"""Norms in this range were found from squares that neither overflow nor matter if lost."""
_SPARE = 12
"""Roundings of a norm besides those of its sum."""
SCORE_RANGE = {torch.float32: 1e37, torch.float64: 1e307}
"""Scores, and sums of values, of at most this magnitude neither overflow nor become NaN."""
SCALE_RANGE = (1e-30, 1e30)
"""Score scales that float32 holds with room to spare on both sides."""


def float32_is_exact() -> bool:
    """Whether float32 products are those of float32, and not of bf16 or tf32.

    `torch.set_float32_matmul_precision` (and what replaces it) lets PyTorch round operands
    behind the caller's back: such products no theorem of float32 covers, so that float64 does
    the work while it is so.
    """
    try:
        return bool(torch.get_float32_matmul_precision() == "highest")
    except RuntimeError:  # it differs between devices
        return False


def row_norms_upper(x: torch.Tensor) -> torch.Tensor:
    """Return upper bounds of Euclidean norms of rows: float64, (...); inf for NaN and Inf."""
    if x.dtype not in _SAFE:
        x = x.float()
    low, high = _SAFE[x.dtype]
    norms = torch.linalg.vector_norm(x, dim=-1)
    raise_by = 1 + (x.shape[-1] + _SPARE) * torch.finfo(x.dtype).eps
    inside = ((norms > low) & (norms < high)) | (norms == 0)
    if not bool(inside.all()) or bool((norms == 0).any()):
        wide = x.double()
        peak = wide.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else wide.sum(-1, True)
        unit = torch.exp2(torch.floor(torch.log2(peak.clamp_min(1e-300))))
        unit = torch.where(peak > 0, unit, torch.ones_like(unit))
        norms = torch.linalg.vector_norm(wide / unit, dim=-1) * unit[..., 0]
    upper = norms.double() * raise_by
    return torch.where(torch.isfinite(upper), upper, torch.inf)


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round to a 16-bit format and back; too large finite numbers become its largest."""
    if name in ("f32", "f64"):
        return x
    most = get_format(name).max_finite
    kept = x.clamp(-most, most).to(DTYPES[name]).to(x.dtype)
    return torch.where(torch.isinf(x), x, kept)


@dataclass(eq=False)
class Operands:
    """Queries, keys and values of a sequence: (heads, len, dim), in one working dtype.

    Attributes
    ----------
    query : Tensor, shape (heads_q, len_q, dim_qk)
    key : Tensor, shape (heads_kv, len_kv, dim_qk)
    value : Tensor, shape (heads_kv, len_kv, dim_v)
    scale : float
    owner : tuple of int or None
        Which key/value head each query head's own keys are a copy of, if they are.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    owner: tuple[int, ...] | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head."""
        return len(self.query) // len(self.key)

    @property
    def len_q(self) -> int:
        """Query rows."""
        return self.query.shape[1]

    @property
    def len_kv(self) -> int:
        """Keys."""
        return self.key.shape[1]

    def to(self, dtype: torch.dtype) -> Operands:
        """Return them in another dtype."""
        if dtype == self.query.dtype:
            return self
        query, key, value = (x.to(dtype) for x in (self.query, self.key, self.value))
        return Operands(query, key, value, self.scale, self.owner)

    def heads(self, chosen: list[int]) -> Operands:
        """Return some query heads, each with a key/value head of its own."""
        if chosen == list(range(len(self.query))) and self.group_size == 1:
            return self
        index = torch.tensor(chosen, device=self.query.device)
        shared = index // self.group_size
        owner = tuple(self.owner[h] if self.owner else h // self.group_size for h in chosen)
        return Operands(
            self.query[index], self.key[shared], self.value[shared], self.scale, owner
        )

    def sharing(self, chosen: list[int]) -> list[list[list[int]]]:
        """Sort query heads by key/value heads; neighbours of whole ones come together.

        Returns
        -------
        list of list of list of int
            What one call attends: heads by key/value head, each as many.
        """
        found: list[list[list[int]]] = []
        for owner, members in groupby(chosen, lambda head: head // self.group_size):
            heads = list(members)
            last = found[-1][-1] if found else []
            whole = len(heads) == len(last) == self.group_size
            if whole and last[0] // self.group_size == owner - 1:
                found[-1].append(heads)
            else:
                found.append([heads])
        return found

    def together(self, chosen: list[int]) -> Operands:
        """Return heads that one call attends, with their key/value heads; see `sharing`."""
        first, last = chosen[0], chosen[-1]
        owners = slice(first // self.group_size, last // self.group_size + 1)
        near = last - first == len(chosen) - 1
        query = self.query[first : last + 1] if near else self.query[chosen]
        return Operands(query, self.key[owners], self.value[owners], self.scale)

    @cached_property
    def side_by_side(self) -> torch.Tensor:
        """Keys and values in one row each: (heads_kv, len_kv, dim_qk + dim_v)."""
        return torch.cat([self.key, self.value], 2)

    @cached_property
    def query_norms(self) -> torch.Tensor:
        """Norms of the queries, rounded up: (heads_q, len_q)."""
        return row_norms_upper(self.query)

    @cached_property
    def key_norms(self) -> torch.Tensor:
        """Norms of the keys, rounded up: (heads_kv, len_kv)."""
        return row_norms_upper(self.key)

    @cached_property
    def value_norms(self) -> torch.Tensor:
        """Norms of the values, rounded up: (heads_kv, len_kv)."""
        return row_norms_upper(self.value)


def peak(norms: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Largest norm of each head; 0 without rows. `seen` leaves out rows that do not count."""
    if seen is not None:
        norms = torch.where(seen, norms, 0.0)
    return norms.amax(dim=-1) if norms.shape[-1] else norms.new_zeros(norms.shape[:-1])


def diameter_upper(value: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Upper bounds of the distance of two values of a head: twice the largest from their mean.

    Parameters
    ----------
    value : Tensor, shape (heads, len_kv, dim_v)
    seen : Tensor of bool, shape (heads, len_kv), optional
        Keys that count.
    """
    if not value.shape[1]:
        return value.new_zeros(len(value), dtype=torch.float64)
    wide = value if value.dtype in _SAFE else value.float()
    if seen is not None:
        wide = torch.where(seen[..., None], wide, 0.0)
    centre = wide.mean(dim=1, keepdim=True)
    centre = torch.where(torch.isfinite(centre), centre, 0.0)
    return 2 * peak(row_norms_upper(wide - centre), seen)
