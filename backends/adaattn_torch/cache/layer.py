"""One layer's keys and values on pages: appended as they are, rounded when a page is full."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.paged import wide_entry
from adaattn_torch.cache.pool import Pool
from adaattn_torch.cache.rounding import Codes, dequantise, quantise

Pair = tuple[torch.Tensor, torch.Tensor]
_CHOOSING_PAGES = 8
"""Full pages of a prefill, spread over it, that a head's format is chosen from."""


class PagedLayer:
    """Keys and values of one attention layer, shapes (batch, heads_kv, len, dim).

    Parameters
    ----------
    page_len : int
    format : {"i8", "e4m3", "wide"}
        Of full pages; the newest page is always wide. ``"wide"`` keeps all as they came.
    budget : float
        Relative error above which a head's pages stay wide.
    room : int
        Keys to make room for at first.

    Attributes
    ----------
    table : ndarray of int64, shape (batch, heads_kv, pages)
        As in `adaattn_core.PagedKV`.
    length : int
        Keys of every sequence, padding included.
    narrow : ndarray of bool, shape (heads_kv,), or None
        Heads whose full pages are narrow; None until the first page is full.
    errors : ndarray, shape (heads_kv, 2), or None
        Relative error of keys and values that it was chosen by.
    tail_pages : ndarray of int64, shape (batch, heads_kv)
        Wide pages of the newest keys.
    version : int
        Counts changes of the table.
    """

    def __init__(self, page_len: int, format: str, budget: float, room: int) -> None:
        self.page_len, self.format, self.budget, self.room = page_len, format, budget, room
        self.length = 0
        self.narrow: NDArray[np.bool_] | None = None
        self.errors: NDArray[np.float64] | None = None
        self.table = np.zeros((0, 0, 0), np.int64)
        self._wide: Pool | None = None
        self._codes: Pool | None = None
        self._tail = torch.empty(0)
        self._dtype, self.device = torch.float32, torch.device("cpu")
        self._value_norm: torch.Tensor | None = None
        self._dims = (0, 0)
        self.version = 0
        self.watch_norms = False

    # -- growing ------------------------------------------------------------------------------
    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room for a batch like these."""
        batch, heads = key.shape[:2]
        self._dims = int(key.shape[3]), int(value.shape[3])
        self._dtype, self.device = key.dtype, key.device
        # One open page for each row; full ones are wide only where codes do not serve.
        full = -(-self.room // self.page_len) * batch * heads
        wide = batch * heads + (full if self.format == "wide" else 0)
        self._wide = Pool(self._make_wide, wide)
        if self.format != "wide":
            self._codes = Pool(self._make_codes, full)
        self.table = np.zeros((batch, heads, 0), np.int64)
        self._open_page()

    def _make_wide(self, pages: int) -> tuple[torch.Tensor, ...]:
        shape = (pages, self.page_len)
        return tuple(
            torch.zeros((*shape, dim), dtype=self._dtype, device=self.device)
            for dim in self._dims
        )

    def _make_codes(self, pages: int) -> tuple[torch.Tensor, ...]:
        parts: list[torch.Tensor] = []
        code = torch.int8 if self.format == "i8" else torch.uint8
        for dim in self._dims:
            for shape, kind in (
                ((pages, self.page_len, dim), code), ((pages,), torch.float32),
                ((pages, dim), torch.float16), ((pages, dim), torch.float16),
                ((pages,), torch.float32),
            ):  # fmt: skip
                parts.append(torch.zeros(shape, dtype=kind, device=self.device))
        return tuple(parts)

    def _open_page(self) -> None:
        """Give every row a wide page for its newest keys."""
        batch, heads, _ = self.table.shape
        assert self._wide is not None
        pages = self._wide.take(batch * heads).reshape(batch, heads)
        self._set_tail(pages)

    def _set_tail(self, pages: NDArray[np.int64]) -> None:
        self.tail_pages = pages
        self._tail = torch.from_numpy(pages).to(self.device)
        self.version += 1

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add keys and values behind the last ones; pages that become full are rounded."""
        if self._wide is None:
            self.begin(key, value)
        if self.watch_norms:
            self._watch(value)
        done, total = 0, int(key.shape[2])
        while done < total:
            used = self.length % self.page_len
            if used == 0 and total - done >= self.page_len:
                whole = (total - done) // self.page_len * self.page_len
                where = slice(done, done + whole)
                self._add_full(*(self._in_pages(x[:, :, where]) for x in (key, value)))
                done, self.length = done + whole, self.length + whole
                continue
            more = min(self.page_len - used, total - done)
            assert self._wide is not None
            for pool, x in zip(self._wide.parts, (key, value), strict=True):
                pool[self._tail, used : used + more] = x[:, :, done : done + more]
            done, self.length = done + more, self.length + more
            if self.length % self.page_len == 0:
                self._close_page()

    def _in_pages(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = x.shape
        return x.reshape(batch, heads, length // self.page_len, self.page_len, dim)

    def _close_page(self) -> None:
        """Round the open page, which is full, where that serves; it is open again then."""
        assert self._wide is not None
        key, value = (pool[self._tail].unsqueeze(2) for pool in self._wide.parts)
        self._add_full(key, value)

    def _add_full(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add full pages, shapes (batch, heads, pages, page_len, dim)."""
        batch, heads, pages = key.shape[:3]
        entries = np.empty((batch, heads, pages), np.int64)
        narrow = np.zeros(entries.shape, bool)
        if self.format != "wide":
            codes = [quantise(x, self.format) for x in (key, value)]
            if self.narrow is None:
                self.narrow = self._choose((key, value), codes)
            usable = (codes[0].usable & codes[1].usable).cpu().numpy()
            narrow = usable & self.narrow[None, :, None]
            if narrow.any():
                entries[narrow] = self._store_codes(codes, narrow)
        if not narrow.all():
            entries[~narrow] = self._store_wide(key, value, ~narrow)
        self.table = np.concatenate([self.table, entries], axis=2)
        self.version += 1

    def _choose(self, exact: Pair, codes: list[Codes]) -> NDArray[np.bool_]:
        """Heads whose keys and values both keep within the budget, measured on these pages."""
        pages = exact[0].shape[2]
        some = torch.linspace(0, pages - 1, min(pages, _CHOOSING_PAGES)).long()
        found = []
        for x, coded in zip(exact, codes, strict=True):
            # Pages that codes cannot hold stay wide, whatever is chosen.
            serves = coded.usable[:, :, some, None, None]
            vectors = torch.where(serves, x[:, :, some].float(), 0.0)
            read = dequantise(
                coded.data[:, :, some], self.format, coded.unit[:, :, some],
                coded.centre[:, :, some], coded.reach[:, :, some],
            )  # fmt: skip
            # Keys: softmax does not see what all of a head's keys have in common.
            spread = vectors - vectors.mean(dim=(2, 3), keepdim=True)
            lost, size = ((y**2).sum(dim=(0, 2, 3, 4)) for y in (vectors - read, spread))
            found.append((lost / size.clamp_min(1e-30)).sqrt().double().cpu().numpy())
        self.errors = np.stack(found, axis=1)
        return np.asarray(np.nan_to_num(self.errors, nan=np.inf).max(axis=1) <= self.budget)

    def _store_codes(self, codes: list[Codes], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        assert self._codes is not None
        pages = self._codes.take(int(chosen.sum()))
        to, of = torch.from_numpy(pages).to(self.device), torch.from_numpy(chosen)
        of = of.to(self.device)
        parts = [x[of] for coded in codes for x in coded[:5]]
        for pool, x in zip(self._codes.parts, parts, strict=True):
            pool[to] = x
        return pages

    def _store_wide(
        self, key: torch.Tensor, value: torch.Tensor, chosen: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        assert self._wide is not None
        pages = self._wide.take(int(chosen.sum()))
        to, of = torch.from_numpy(pages).to(self.device), torch.from_numpy(chosen)
        of = of.to(self.device)
        for pool, x in zip(self._wide.parts, (key, value), strict=True):
            pool[to] = x[of]
        return np.asarray(wide_entry(pages))

    # -- reading ------------------------------------------------------------------------------
    def dense(self) -> Pair:
        """Return keys and values in the model's format; wide ones bit for bit."""
        assert self._wide is not None
        full = self.table.shape[2]
        used = self.length - full * self.page_len
        out = []
        where = torch.from_numpy(self.table).to(self.device)
        narrow = where >= 0
        for side in (0, 1):
            wide, dim = self._wide.parts[side], self._dims[side]
            shape = (*self.table.shape[:2], self.length, dim)
            x = torch.empty(shape, dtype=self._dtype, device=self.device)
            if full:
                pages = wide[torch.where(narrow, 0, wide_entry(where))]
                if self._codes is not None and bool(narrow.any()):
                    pages[narrow] = self._read_codes(side, where[narrow]).to(self._dtype)
                x[:, :, : full * self.page_len] = pages.flatten(2, 3)
            if used:
                x[:, :, full * self.page_len :] = wide[self._tail, :used]
            out.append(x)
        return out[0], out[1]

    def _read_codes(self, side: int, pages: torch.Tensor) -> torch.Tensor:
        assert self._codes is not None
        data, unit, centre, reach, _ = self._codes.parts[5 * side : 5 * side + 5]
        return dequantise(data[pages], self.format, unit[pages], centre[pages], reach[pages])

    # -- changing -----------------------------------------------------------------------------
    def select(self, rows: NDArray[np.int64]) -> None:
        """Let the batch consist of these of its sequences; full pages are shared."""
        if self._wide is None:
            return
        self.table = self.table[rows]
        if self._value_norm is not None:
            self._value_norm = self._value_norm[torch.from_numpy(rows).to(self.device)]
        old = self._tail[torch.from_numpy(rows).to(self.device)]
        kept = [pool[old] for pool in self._wide.parts]
        self._give_back(open_too=False)
        self._open_page()
        for pool, x in zip(self._wide.parts, kept, strict=True):
            pool[self._tail] = x

    def crop(self, length: int) -> None:
        """Forget all keys from `length` on; a full page that is cut is open again, as read."""
        if self._wide is None or length >= self.length:
            return
        full = length // self.page_len
        if full < self.table.shape[2]:
            entries = np.ascontiguousarray(self.table[:, :, full])
            cut = torch.from_numpy(entries).to(self.device)
            narrow = cut >= 0
            for side, pool in enumerate(self._wide.parts):
                page = pool[torch.where(narrow, 0, wide_entry(cut))]
                if self._codes is not None and bool(narrow.any()):
                    page[narrow] = self._read_codes(side, cut[narrow]).to(self._dtype)
                pool[self._tail] = page
            self.table = self.table[:, :, :full]
            self._give_back(open_too=True)
        self.length = length
        self.version += 1

    def _give_back(self, *, open_too: bool) -> None:
        """Give back pages that no entry names any more."""
        assert self._wide is not None
        wide = wide_entry(self.table[self.table < 0])
        held = [wide, self.tail_pages.ravel()] if open_too else [wide]
        self._wide.keep(np.concatenate(held))
        if self._codes is not None:
            self._codes.keep(self.table[self.table >= 0])
        self.version += 1

    def _watch(self, value: torch.Tensor) -> None:
        """Keep the largest norm of a value, by sequence and head."""
        norm = value.double().norm(dim=-1).amax(-1) * (1 + 2.0**-40)
        known = self._value_norm
        self._value_norm = norm if known is None else torch.maximum(known, norm)

    # -- telling ------------------------------------------------------------------------------
    def footprint(self) -> tuple[float, float]:
        """Bytes of the pages in use with their table, and of the same keys in 16 bits."""
        if self._wide is None:
            return 0.0, 0.0
        used = self._wide.used * self._wide.page_bytes() + self.table.size * 4
        if self._codes is not None:
            used += self._codes.used * self._codes.page_bytes()
        batch, heads = self.table.shape[:2]
        return float(used), 2.0 * batch * heads * self.length * sum(self._dims)

    def pools(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """Return the parts of the wide pages, and of narrow ones if there are any."""
        assert self._wide is not None
        return self._wide.parts, None if self._codes is None else self._codes.parts

    def value_norm_upper(self) -> torch.Tensor:
        """Return the largest norm of a value so far, shape (batch, heads)."""
        assert self._value_norm is not None
        return self._value_norm

    def residuals(self) -> NDArray[np.float64]:
        """Largest residuals of keys and values, shape (batch, heads, 2)."""
        batch, heads, full = self.table.shape
        found = np.zeros((batch, heads, 2))
        if self._codes is None or not full:
            return found
        names = self.table >= 0
        for side in (0, 1):
            upper = self._codes.parts[5 * side + 4].double().cpu().numpy()
            by_page = np.where(names, upper[np.where(names, self.table, 0)], 0.0)
            found[:, :, side] = by_page.max(axis=2)
        return found
