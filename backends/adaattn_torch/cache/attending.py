"""Decode steps straight from the pages, by a backend that `Decodes`; what they may be off by.

A model asks its cache for keys and values before it attends. What it gets here looks like them
and holds NaN: attention that knows the sign takes the pages, any other gives NaN, never a wrong
number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from adaattn_core.decoding import Decodes, DevicePages
from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_core.paged import wide_entry
from adaattn_torch.cache.layer import PagedLayer
from adaattn_torch.forward import backend_for

ROWS_MOST = 64
DIMS = (64, 128, 256)
"""Rows and dims of the kernels that there are; a backend is asked for no others."""
SIGN = "adaattn_pages"
"""Attribute of a tensor that stands for the keys of a `PagedSteps`."""


class PagedSteps:
    """Decode steps of one layer.

    Parameters
    ----------
    pages : PagedLayer
    lam : float
        Mean weight of 64 keys below which their values need not be read.
    certify : bool
        Whether every step's bound is worked out, on the device, and the largest kept.

    Attributes
    ----------
    steps : int
        Steps that attended so.
    worst : Tensor of float64, shape (heads_q,), or None
        Largest bound of a step's error by head, relative to its rows' rms.
    """

    def __init__(self, pages: PagedLayer, lam: float, certify: bool) -> None:
        self.pages, self.lam, self.certify = pages, lam, certify
        self.steps = 0
        self.worst: torch.Tensor | None = None
        self._backends: dict[torch.device, Decodes | None] = {}
        self._version = -1
        self._pools: tuple[Any, Any, Any, Any, str] = (None, None, None, None, "")
        self._table = self._ruler = self._zeros = torch.empty(0)
        self._residuals = torch.empty(0)
        self._starts: tuple[Any, torch.Tensor] | None = None

    def serves(self, key: torch.Tensor) -> bool:
        """Whether keys like these, of a step, are attended to by a backend over the pages."""
        if not 0 < key.shape[2] <= ROWS_MOST or key.requires_grad:
            return False
        if key.dtype not in (torch.bfloat16, torch.float16) or key.shape[3] not in DIMS:
            return False
        return self._backend(key.device) is not None

    def _backend(self, device: torch.device) -> Decodes | None:
        """Backend for tensors on a device; asked for once, since every step wants it."""
        if device not in self._backends:
            try:
                backend = backend_for("auto", device.type)
            except AdaAttnError:
                return None
            self._backends[device] = backend if isinstance(backend, Decodes) else None
        return self._backends[device]

    def stand_in(self, key: torch.Tensor, dim: int) -> torch.Tensor:
        """Return what stands for all keys (or values) so far: their shape, and NaN."""
        shape = (*key.shape[:2], self.pages.length, dim)
        made = key.new_full((), math.nan).expand(shape)
        setattr(made, SIGN, self)
        return made

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        left: int = -1,
    ) -> torch.Tensor:
        """Attention of the newest rows, shape of `query`."""
        backend = self._backend(query.device)
        assert backend is not None, "serves() was asked"
        pages = self._device_pages(self._first_seen(mask, query))
        out, _, dropped = backend.decode(
            query, pages, scale=scale, causal=True, left=left, lam=self.lam
        )
        self.steps += 1
        if self.certify:
            self._note(query, out, dropped, scale)
        return torch.as_tensor(out)

    def uppers(self) -> list[float] | None:
        """Largest bound of the heads of each KV head's group; None where none was certified."""
        if self.worst is None:
            return None
        groups = self.worst.reshape(self.pages.table.shape[1], -1)
        found: list[float] = groups.amax(-1).tolist()
        return found

    def _first_seen(self, mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
        """First visible key of every sequence, from a mask that hides nothing but the left."""
        batch, length = query.shape[0], self.pages.length
        if mask is None:
            if self._zeros.shape[0] != batch:
                self._zeros = torch.zeros(batch, dtype=torch.int32, device=query.device)
            return self._zeros
        if self._starts is not None and self._starts[0] is mask:
            return self._starts[1]
        seen = mask if mask.dtype == torch.bool else mask == 0
        len_q = query.shape[2]
        if seen.shape[-1] != length or seen.shape[-2] != len_q or seen.shape[1] != 1:
            raise _other_mask(f"a mask of shape {tuple(seen.shape)} over {length} keys")
        start = (~seen[:, 0, -1]).sum(dim=-1)
        keys = torch.arange(length, device=seen.device)
        rows = torch.arange(length - len_q, length, device=seen.device)
        expected = (keys >= start[:, None, None]) & (keys <= rows[None, :, None])
        # A row of padding sees itself in some versions: what it computes is not looked at.
        padding = rows[None, :, None] < start[:, None, None]
        if not bool(((seen[:, 0] == expected) | padding).all()):
            raise _other_mask("a mask that hides more than padding on the left and later keys")
        starts = start.to(torch.int32).expand(batch).contiguous()
        self._starts = (mask, starts)
        return starts

    def _device_pages(self, starts: torch.Tensor) -> DevicePages:
        layer = self.pages
        if self._version != layer.version:
            self._refresh()
        batch = layer.table.shape[0]
        if layer.length >= self._ruler.shape[0] or self._ruler.shape[1] != batch:
            room = max(2 * layer.length, 1024)
            ruler = torch.arange(room, dtype=torch.int32, device=self._table.device)
            self._ruler = ruler[:, None].expand(room, batch).contiguous()
        key, value, narrow, narrow_value, format = self._pools
        return DevicePages(
            key, value, narrow, narrow_value, format, self._table,
            self._ruler[layer.length], starts, layer.length,
        )  # fmt: skip

    def _refresh(self) -> None:
        layer = self.pages
        open_page = wide_entry(layer.tail_pages)[:, :, None]
        table = np.concatenate([layer.table, open_page], axis=2).astype(np.int32)
        device = layer.device
        self._table = torch.from_numpy(np.ascontiguousarray(table)).to(device)
        wide, codes = layer.pools()
        self._pools = (wide[0], wide[1], None, None, "i8")
        if codes:
            self._pools = (wide[0], wide[1], codes[:4], codes[5:9], layer.format)
        if self.certify:
            self._residuals = torch.from_numpy(layer.residuals()).to(device)
        self._version = layer.version

    def _note(
        self, query: torch.Tensor, out: torch.Tensor, dropped: torch.Tensor, scale: float
    ) -> None:
        """Theorem 11 for every head of a step, in float64 on the device; nothing waits."""
        group = query.shape[1] // self.pages.table.shape[1]
        kappa, omega = self._residuals.repeat_interleave(group, dim=1).unbind(-1)
        norm = self.pages.value_norm_upper().repeat_interleave(group, dim=1)
        size = query.double().norm(dim=-1).amax(-1)
        rms = out.double().square().sum(-1).mean(-1).sqrt()
        diameter = 2 * norm
        bound = torch.tanh(scale * size * kappa / 2) * diameter
        bound = bound + dropped.double().amax(-1) * (1 + 2.0**-8) * diameter + omega
        upper = (bound / rms * (1 + 2.0**-30)).amax(0)
        self.worst = upper if self.worst is None else torch.maximum(self.worst, upper)


def _other_mask(got: str) -> UnsupportedError:
    return UnsupportedError(
        got=got,
        needed="causal rows, padding on the left",
        do='use another attention implementation (model.set_attn_implementation("sdpa"))',
    )
