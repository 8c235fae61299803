"""Caches for tests: the same keys and values on pages and as arrays; what nobody may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.formats import FORMATS
from adaattn_core.mask import Mask
from adaattn_core.paged import HOLE, PagedKV, wide_entry
from adaattn_core.pages import Pages, quantise_pages
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import ExactAttention, exact_attention

Send = Callable[[NDArray[Any]], Any]
SPARE_PAGES = 2
"""Pages of a pool that no table names; full of NaN."""


@dataclass(frozen=True)
class PagedSpec:
    """A decode problem: what is on the pages, where they lie, which keys are visible.

    Attributes
    ----------
    starts, lengths : tuple of int
        Visible keys of each sequence; what else is on its pages is NaN.
    narrow : str
        ``"i8"``, ``"e4m3"``, or "" for wide pages only. Of the full pages of visible keys, most
        are narrow then.
    causal : bool
        Whether the rows are those of the newest keys.
    skew : float
        Factor on the scores of every eighth key: attention that is not diffuse.
    peak : float
        How far a row leans towards the newest key of its sequence: above 0 its scores have a
        peak there, and other pages matter little.
    order : int
        Seed of where pages lie; `seed` is that of what is on them.
    """

    starts: tuple[int, ...] = (0,)
    lengths: tuple[int, ...] = (40,)
    heads_kv: int = 1
    group: int = 1
    len_q: int = 1
    page_len: int = 16
    dim_qk: int = 8
    dim_v: int = 8
    dtype: str = "f32"
    narrow: str = ""
    causal: bool = False
    skew: float = 1.0
    peak: float = 0.0
    seed: int = 0
    order: int = 0

    def _dense(self, name: int, heads: int, length: int, dim: int) -> NDArray[Any]:
        rng = np.random.default_rng((self.seed, name))
        x = rng.standard_normal((len(self.lengths), heads, length, dim))
        if name == 1:  # keys: channels that differ in size and do not change sign
            x[..., ::3] = 4 + 0.5 * x[..., ::3]
            x[:, :, ::8] *= self.skew
        dtype = FORMATS[self.dtype].dtype
        assert dtype is not None
        return x.astype(dtype)

    @cached_property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Query, key and value; keys from a sequence's own position 0 on."""
        longest = max(self.lengths)
        query = self._dense(0, self.heads_kv * self.group, self.len_q, self.dim_qk)
        key = self._dense(1, self.heads_kv, longest, self.dim_qk)
        if self.peak:
            for b, stop in enumerate(self.lengths):
                newest = key[b, :, max(stop - 1, 0)].astype(np.float64)
                newest[:, ::3] -= 4  # what all keys have in common
                leaning = np.repeat(newest, self.group, axis=0)[:, None]
                query[b] = (query[b] + self.peak * leaning).astype(query.dtype)
        return query, key, self._dense(2, self.heads_kv, longest, self.dim_v)

    @property
    def mask(self) -> Mask:
        """Mask of the rows over the pages."""
        return Mask.causal("bottom_right") if self.causal else Mask.none()

    def dense(self) -> AttentionProblem:
        """Return the problem on arrays, before anything was rounded: what the truth is."""
        query, key, value = self.arrays
        visible = [b - a for a, b in zip(self.starts, self.lengths, strict=True)]
        shifted = []
        for x in (key, value):
            out = np.zeros((*x.shape[:2], max(visible), x.shape[3]), x.dtype)
            for b, (low, high) in enumerate(zip(self.starts, self.lengths, strict=True)):
                out[b, :, : high - low] = x[b, :, low:high]
            shifted.append(out)
        mask = self.mask & Mask.key_lengths(visible)
        return AttentionProblem.from_arrays(query, *shifted, mask=mask)

    def paged(self, send: Send = lambda x: x) -> PagedKV:
        """Return keys and values on pages that lie in random order among pages of NaN."""
        rng = np.random.default_rng((self.order, 3))
        choice = np.random.default_rng((self.seed, 4))
        _, key, value = self.arrays
        pages = -(-max(self.lengths) // self.page_len) + 1
        wide: list[tuple[Any, Any]] = []
        narrow: list[tuple[Any, Any]] = []
        table = np.full((len(self.lengths), self.heads_kv, pages), HOLE, np.int64)
        for b, (start, stop) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for h in range(self.heads_kv):
                for p in range(pages):
                    low, high = (
                        max(start, p * self.page_len),
                        min(stop, (p + 1) * self.page_len),
                    )
                    if low >= high:
                        continue
                    full = high - low == self.page_len
                    pool = narrow if self.narrow and full and choice.random() < 0.8 else wide
                    where = slice(low - p * self.page_len, high - p * self.page_len)
                    made = []
                    for x in (key, value):
                        page = np.full((self.page_len, x.shape[3]), np.nan, x.dtype)
                        page[where] = x[b, h, low:high]
                        made.append(page)
                    table[b, h, p] = len(pool) if pool is narrow else wide_entry(len(pool))
                    pool.append((made[0], made[1]))
        blank = tuple(
            np.full((self.page_len, x.shape[3]), np.nan, x.dtype) for x in (key, value)
        )
        wide += [(blank[0], blank[1])] * SPARE_PAGES
        moves = [rng.permutation(len(pool)) for pool in (wide, narrow)]
        pools = [
            np.stack([pool[i][side] for i in np.argsort(move)])
            for side in (0, 1)
            for pool, move in zip((wide, narrow), moves, strict=True)
            if pool
        ]
        for index, entry in np.ndenumerate(table):
            if entry >= 0:
                table[index] = moves[1][entry]
            elif entry != HOLE:
                table[index] = wide_entry(moves[0][wide_entry(entry)])
        if not narrow:
            key_pages, value_pages = (Pages.wide(send(x)) for x in pools)
            return PagedKV.from_pages(
                key_pages, value_pages, table=table, lengths=self.lengths, starts=self.starts
            )
        wides = [Pages.wide(send(x)) for x in pools[::2]]
        narrows = [_sent(quantise_pages(x, self.narrow), send) for x in pools[1::2]]
        return PagedKV.from_pages(
            *wides, key_narrow=narrows[0], value_narrow=narrows[1], table=table,
            lengths=self.lengths, starts=self.starts,
        )  # fmt: skip

    def stored(self, scale: float | None = None, left: int = -1) -> ExactAttention:
        """Return exact attention of what the pages hold, rounded as it may be.

        Parameters
        ----------
        scale : float, optional
        left : int
            Keys before its own that a row sees; -1: all.
        """
        dense = self.dense()
        key, value = (x.astype(np.float64) for x in self.paged().gather())
        mask = dense.mask
        if left >= 0:
            window = Mask.sliding_window(left, 0, "bottom_right")
            mask = replace(window, lengths=dense.mask.lengths)
        query = dense.query.astype(np.float64)
        wide = replace(dense, query=query, key=key, value=value, dtype="f64", mask=mask)
        return exact_attention(wide if scale is None else replace(wide, scale=scale))

    def problem(self, send: Send = lambda x: x) -> AttentionProblem:
        """Return the problem on pages."""
        return AttentionProblem.from_arrays(
            send(self.arrays[0]), self.paged(send), None, mask=self.mask
        )


def _sent(pages: Pages, send: Send) -> Pages:
    return Pages.narrow(
        send(pages.data), pages.format, unit=send(pages.unit), centre=send(pages.centre),
        reach=send(pages.reach), residual_upper=send(pages.residual_upper),
    )  # fmt: skip


@st.composite
def paged_specs(draw: st.DrawFn, /, **fixed: Any) -> PagedSpec:
    """Strategy of caches: ragged, padded, empty, on pages of any size; `fixed` fields stay."""
    page_len = fixed.get("page_len") or draw(st.sampled_from((1, 2, 5, 8, 16, 64)))
    batch = draw(st.integers(1, 3))
    most = 3 * page_len + 2
    lengths, starts = [], []
    for _ in range(batch):
        stop = draw(st.integers(0, most))
        lengths.append(stop)
        starts.append(draw(st.integers(0, stop)) if draw(st.booleans()) else 0)
    drawn = {
        "heads_kv": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from((1, 2, 4))),
        "len_q": draw(st.sampled_from((1, 1, 2, 5))),
        "dim_qk": draw(st.sampled_from((1, 3, 8, 16))),
        "dim_v": draw(st.sampled_from((1, 4, 8))),
        "dtype": draw(st.sampled_from(("f64", "f32", "f16", "bf16"))),
        "narrow": draw(st.sampled_from(("", "i8", "e4m3"))),
        "causal": draw(st.booleans()),
        "skew": draw(st.sampled_from((1.0, 8.0))),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "order": draw(st.integers(0, 2**32 - 1)),
    }
    return PagedSpec(
        starts=tuple(starts), lengths=tuple(lengths), page_len=page_len,
        **{**drawn, **{k: v for k, v in fixed.items() if k != "page_len"}},
    )  # fmt: skip
