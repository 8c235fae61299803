"""Decode steps: a backend's short way over a growing cache that lies on its device.

`PagedKV` is checked, immutable, and its table is on the host: right for a problem, too slow for
a cache that grows at every step. Whoever owns such a cache answers for its table himself.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable


class DevicePages(NamedTuple):
    """A cache on a device, as a backend that `Decodes` reads it; nothing is checked.

    Attributes
    ----------
    key, value : array, shape (pages, page_len, dim)
        Wide pages.
    key_narrow, value_narrow : tuple of array, or None
        Codes, unit, centre, reach of `adaattn_core.pages.Pages`.
    format : str
        Of the codes.
    table : array of int32, shape (batch, heads_kv, pages)
        As in `adaattn_core.paged.PagedKV`, the page of the newest keys included.
    lengths, starts : array of int32, shape (batch,)
        Keys ``starts[b] .. lengths[b] - 1`` are visible.
    keys_max : int
        No less than the largest length.
    """

    key: Any
    value: Any
    key_narrow: tuple[Any, ...] | None
    value_narrow: tuple[Any, ...] | None
    format: str
    table: Any
    lengths: Any
    starts: Any
    keys_max: int


@runtime_checkable
class Decodes(Protocol):
    """A backend with a short way over pages: no plan, no facts but what was left out."""

    def decode(
        self,
        query: Any,
        pages: DevicePages,
        *,
        scale: float,
        causal: bool = True,
        left: int = -1,
        lam: float = 0.0,
    ) -> tuple[Any, Any, Any]:
        """Compute attention of the newest rows.

        Parameters
        ----------
        query : array, shape (batch, heads_q, len_q, dim)
        pages : DevicePages
        scale : float
        causal : bool
            Whether row i is that of key ``length - len_q + i``, and sees no later one.
        left : int
            Keys before its own that a row sees; -1: all.
        lam : float
            Mean weight of a run of keys below which their values need not be read (docs/math,
            theorem 11); 0: all are read.

        Returns
        -------
        out : array, shape (batch, heads_q, len_q, dim)
        lse : array of float32, shape (batch, heads_q, len_q)
        dropped : array of float32, same shape
            Share of the row's mass whose values were not read.

        Raises
        ------
        UnsupportedError
            For sizes or formats that its kernel does not have.
        """
        ...
