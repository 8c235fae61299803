"""PagedKV: keys and values of a cache as part of a problem: pages, a page table, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import INPUT_FORMATS, array_device, to_numpy
from adaattn_core.checks import shown
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError
from adaattn_core.formats import get_format
from adaattn_core.pages import Pages

HOLE = np.iinfo(np.int32).min
"""Table entry of a page that no visible key lies on (behind a window, before padding's end)."""


def wide_entry(page: Any) -> Any:
    """Table entry of page number `page` of the wide pool; narrow pages are entered as they are.

    An entry says pool and page at once: n >= 0 is narrow page n, -1 - n is wide page n.
    """
    return -1 - page


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values of a batch of sequences, one page table row per sequence and head.

    Attributes
    ----------
    key, value : Pages
        Wide pools, in the format of the queries; a page number means a page in both.
    key_narrow, value_narrow : Pages or None
        8-bit pools, of the same page length.
    table : ndarray of int32, shape (batch, heads_kv, pages)
        On the host. Entry p of a row says where keys ``p * page_len .. (p + 1) * page_len - 1``
        lie: see `wide_entry` and `HOLE`. Pages may be shared between sequences.
    lengths, starts : ndarray of int64, shape (batch,)
        Keys ``starts[b] .. lengths[b] - 1`` of sequence b are visible; what else lies on its
        pages is never looked at.
    dtype, device : str
        Of the wide pages.
    """

    key: Pages
    value: Pages
    key_narrow: Pages | None
    value_narrow: Pages | None
    table: NDArray[np.int32]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    dtype: str
    device: str

    @classmethod
    def from_pages(
        cls,
        key: Pages,
        value: Pages,
        *,
        table: Any,
        lengths: Any,
        starts: Any = None,
        key_narrow: Pages | None = None,
        value_narrow: Pages | None = None,
    ) -> PagedKV:
        """Check everything and build the cache.

        Parameters
        ----------
        key, value, key_narrow, value_narrow : Pages
        table : array_like of int, shape (batch, heads_kv, pages)
        lengths : array_like of int, shape (batch,)
        starts : array_like of int, shape (batch,), optional
            Default 0: no padding on the left.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            If pools, table and lengths do not fit together; nothing is left to be found out by
            a kernel.
        """
        dtype, device = _check_pools(key, value, key_narrow, value_narrow)
        rows = _whole_array("table", table, 3)
        if rows.shape[1] < 1:
            raise ShapeError(
                got=f"a page table of shape {rows.shape}",
                needed="(batch, heads_kv, pages) with at least one head",
                do="repeat a table that all heads share: page = sequence's page * heads + head",
            )
        batch = rows.shape[0]
        stop = _whole_array("lengths", lengths, 1)
        start = (
            np.zeros(batch, np.int64) if starts is None else _whole_array("starts", starts, 1)
        )
        room = rows.shape[2] * key.page_len
        for name, x in (("lengths", stop), ("starts", start)):
            if x.shape != (batch,):
                raise ShapeError(
                    got=f"{x.shape[0]} {name} for a page table of {batch} sequences",
                    needed="one per sequence",
                    do="reorder table and lengths together",
                )
        bad = np.flatnonzero((start < 0) | (start > stop) | (stop > room))
        if len(bad):
            b = int(bad[0])
            raise ArgumentError(
                got=f"keys {start[b]} to {stop[b]} of sequence {b} on {rows.shape[2]} pages of"
                f" {key.page_len}",
                needed=f"0 <= start <= length <= {room}",
                do="update the lengths together with the table",
            )
        counts = key.count, 0 if key_narrow is None else key_narrow.count
        _check_table(rows, start, stop, key.page_len, *counts)
        kept: NDArray[np.int32] = np.ascontiguousarray(rows, np.int32)
        for array in (kept, stop, start):
            array.setflags(write=False)
        return cls(key, value, key_narrow, value_narrow, kept, stop, start, dtype, device)

    # -- sizes --------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.table.shape[0])

    @property
    def heads_kv(self) -> int:
        """Key/value heads."""
        return int(self.table.shape[1])

    @property
    def page_len(self) -> int:
        """Keys of a page."""
        return self.key.page_len

    @cached_property
    def visible(self) -> tuple[int, ...]:
        """Visible keys of each sequence."""
        return tuple((self.lengths - self.starts).tolist())

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """(batch, heads_kv, most visible keys of a sequence, dim_qk)."""
        return self.batch, self.heads_kv, max(self.visible, default=0), self.key.dim

    @property
    def value_shape(self) -> tuple[int, int, int, int]:
        """(batch, heads_kv, most visible keys of a sequence, dim_v)."""
        return *self.key_shape[:3], self.value.dim

    # -- contents -----------------------------------------------------------------------------
    def used_pages(self, sequence: int, head: int) -> NDArray[np.int32]:
        """Table entries of the pages that hold visible keys, in their order."""
        first, last = _page_range(
            int(self.starts[sequence]), int(self.lengths[sequence]), self.page_len
        )
        return np.asarray(self.table[sequence, head, first:last])

    def residuals(self, sequence: int, head: int) -> tuple[float, float]:
        """Upper bounds of what rounding took from a visible key, and from a visible value.

        0 where every visible key lies on a wide page. Pages are taken whole.
        """
        entries = self.used_pages(sequence, head)
        pages = entries[entries >= 0]
        if not len(pages):
            return 0.0, 0.0
        assert self.key_narrow is not None
        assert self.value_narrow is not None
        found = (
            float(to_numpy(pool.residual_upper)[pages].max())
            for pool in (self.key_narrow, self.value_narrow)
        )
        return next(found), next(found)

    def gather(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Visible keys and values as dense host arrays, shapes `key_shape` and `value_shape`.

        Sequences begin at their first visible key; what is behind their last one is 0. In
        float64 for f64 pages, else in float32, which holds every stored number.
        """
        dtype = np.float64 if self.dtype == "f64" else np.float32
        dense = []
        pools = ((self.key, self.key_narrow), (self.value, self.value_narrow))
        for (wide, narrow), shape in zip(
            pools, (self.key_shape, self.value_shape), strict=True
        ):
            wide, narrow = _on_host(wide), _on_host(narrow) if narrow else None
            out = np.zeros(shape, dtype)
            for b in range(self.batch):
                for h in range(self.heads_kv):
                    self._read_row(b, h, wide, narrow, out[b, h])
            dense.append(out)
        return dense[0], dense[1]

    def _read_row(
        self, sequence: int, head: int, wide: Pages, narrow: Pages | None, out: NDArray[Any]
    ) -> None:
        start, stop = int(self.starts[sequence]), int(self.lengths[sequence])
        first, last = _page_range(start, stop, self.page_len)
        for p in range(first, last):
            entry = int(self.table[sequence, head, p])
            low, high = max(start, p * self.page_len), min(stop, (p + 1) * self.page_len)
            pool = wide if entry < 0 else narrow
            assert pool is not None
            vectors = pool.read(entry if entry >= 0 else wide_entry(entry))
            inside = slice(low - p * self.page_len, high - p * self.page_len)
            out[low - start : high - start] = vectors[inside].astype(out.dtype)

    def footprint(self) -> dict[str, float]:
        """Bytes of the pages that hold visible keys, and of the same keys in 16 bits.

        Shared pages count once.
        """
        wide: set[int] = set()
        narrow: set[int] = set()
        keys = 0
        for b in range(self.batch):
            for h in range(self.heads_kv):
                entries = self.used_pages(b, h).tolist()
                wide.update(n for n in entries if n < 0)
                narrow.update(n for n in entries if n >= 0)
                keys += self.visible[b]
        used = len(wide) * (self.key.page_bytes() + self.value.page_bytes())
        if self.key_narrow is not None and self.value_narrow is not None:
            pair = self.key_narrow.page_bytes() + self.value_narrow.page_bytes()
            used += len(narrow) * pair
        table = float(self.table.nbytes + self.lengths.nbytes + self.starts.nbytes)
        plain = 2.0 * keys * (self.key.dim + self.value.dim)
        return {"bytes": used + table, "bytes_16bit": plain,
                "ratio": (used + table) / plain if plain else 1.0}  # fmt: skip


def _on_host(pool: Pages) -> Pages:
    parts = (pool.unit, pool.centre, pool.reach, pool.residual_upper)
    return Pages(
        to_numpy(pool.data), pool.format, *(None if x is None else to_numpy(x) for x in parts)
    )


def _page_range(start: int, stop: int, page_len: int) -> tuple[int, int]:
    """First and one-past-last page of some keys; empty where there are none."""
    return start // page_len, -(-stop // page_len) if stop > start else start // page_len


def _check_pools(
    key: Pages, value: Pages, key_narrow: Pages | None, value_narrow: Pages | None
) -> tuple[str, str]:
    named = {"key": key, "value": value, "key_narrow": key_narrow, "value_narrow": value_narrow}
    if (key_narrow is None) != (value_narrow is None):
        raise ArgumentError(
            got="narrow pages of keys or of values alone",
            needed="both or none: a page number means a page in both pools",
            do="quantise keys and values together",
        )
    pools = {name: pool for name, pool in named.items() if pool is not None}
    for name, pool in pools.items():
        narrow = name.endswith("narrow")
        if not isinstance(pool, Pages) or pool.is_narrow != narrow:
            raise ArgumentError(
                got=f"{name}={type(pool).__name__}",
                needed=f"{'narrow' if narrow else 'wide'} Pages",
                do="make it with Pages.wide, or quantise_pages for 8 bits",
            )
    if key.format != value.format or key.format not in INPUT_FORMATS:
        raise DTypeError(
            got=f"wide pages in {key.format} (keys) and {value.format} (values)",
            needed=f"one format out of {', '.join(INPUT_FORMATS)}",
            do="keep the newest keys and values in the model's own format",
        )
    for side in (("key", "key_narrow"), ("value", "value_narrow")):
        dims = {pools[name].dim for name in side if name in pools}
        if len(dims) != 1:
            raise ShapeError(
                got=f"{side[0]} pages of dim {' and '.join(map(str, sorted(dims)))}",
                needed="vectors of one length in both pools",
                do="check that all pages come from one layer",
            )
    for what, found in (
        ("page lengths", {pool.page_len for pool in pools.values()}),
        ("devices", {array_device(x) for pool in pools.values() for x in pool.arrays()}),
        ("wide page counts", {key.count, value.count}),
    ):
        if len(found) != 1:
            raise ShapeError(
                got=f"pools of {what} {', '.join(map(str, sorted(found)))}",
                needed="one for all pools",
                do="allocate the pools of a cache together",
            )
    if key_narrow and value_narrow and key_narrow.count != value_narrow.count:
        raise ShapeError(
            got=f"{key_narrow.count} narrow pages of keys, {value_narrow.count} of values",
            needed="as many of both",
            do="allocate the pools of a cache together",
        )
    assert get_format(key.format)
    return key.format, array_device(key.data)


def _check_table(
    table: NDArray[np.int64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    page_len: int,
    wide: int,
    narrow: int,
) -> None:
    for b, (low, high) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        first, last = _page_range(low, high, page_len)
        for h, row in enumerate(table[b, :, first:last]):
            outside = (row >= narrow) | (row < -wide)
            if outside.any():
                p = int(np.flatnonzero(outside)[0])
                entry = int(row[p])
                what = "a hole" if entry == HOLE else f"entry {entry}"
                raise ArgumentError(
                    got=f"{what} for page {first + p} of sequence {b}, head {h}, which holds"
                    " visible keys",
                    needed=f"a narrow page 0 to {narrow - 1}, or wide_entry of 0 to {wide - 1}",
                    do="check the page table, and that the lengths are not stale",
                )
            if len(np.unique(row)) != len(row):
                raise ArgumentError(
                    got=f"a page that comes twice for sequence {b}, head {h}",
                    needed="different pages for different keys of a row",
                    do="check the page table; only sequences may share pages",
                )


def _whole_array(name: str, x: Any, axes: int) -> NDArray[np.int64]:
    array = np.asarray(x)
    if array.ndim != axes or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ShapeError(
            got=f"{name}={shown(x)}",
            needed=f"whole numbers in {axes} axes, on the host",
            do="build table and lengths with NumPy; only pages live on a device",
        )
    return array.astype(np.int64)
