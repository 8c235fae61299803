"""Exact heads in 8 bits first: their quantiser, and the argument of their attention."""

from __future__ import annotations

from adaattn_cuda.device import driver
from adaattn_cuda.kernels.sm90_attn_fwd_8bit import QuantisedParams, pack
from adaattn_cuda.kernels.smxx_quantize import Quantiser
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.planner.specs import narrow_tile
from adaattn_cuda.tuning.sm90_attn_fwd_f16 import padded_dim

__all__ = ["Narrow"]


class Narrow:
    """What a launch of the planning kernels knows of its dense heads in 8 bits.

    Parameters
    ----------
    task : Task
        The whole problem, in the formats of those heads.
    stream : int
        Where it will be started first.

    Attributes
    ----------
    formats : tuple of str
    tile : Tile
    room : tuple of int
        Items of a head; bytes of codes, and of what comes with them.
    size_bytes : int
        Of tables that live as long as this object.
    """

    def __init__(self, task: Task, stream: int) -> None:
        dims = (padded_dim(array.shape[3]) for array in (task.query, task.value))
        self._task, self._quantiser = task, Quantiser(task, stream)
        self.formats = task.qk, task.pv
        self.tile = narrow_tile(*self.formats, *dims)
        layout = self._quantiser.layout
        tiles = -(-task.query.shape[2] // self.tile.tile_m)
        self.room = tiles, layout.codes()[1], layout.scales()[1]
        self.size_bytes = self._quantiser.size_bytes

    def quantise(
        self, pointers: tuple[int, ...], codes: int, scales: int, decision: int
    ) -> list[driver.Call]:
        """Return the launches that make codes, of heads whose `decision` is -1."""
        return self._quantiser.calls(pointers[:3], codes, scales, 0, decision)

    def attention(self, pointers: tuple[int, ...], codes: int, scales: int) -> QuantisedParams:
        """Return the argument of the attention, without its work."""
        layout = self._quantiser.layout
        return pack(self._task, self.tile, layout, pointers, codes, scales)
