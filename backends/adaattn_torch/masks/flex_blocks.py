"""FlexAttention's `BlockMask` as block-sparse plans, read block by block.

A `BlockMask` lists, for every tile of queries, the key blocks that are seen whole and those
that are seen in part; a Python function decides inside the latter. Here the lists become
`BlockSparse.blocks` and the function has to say the same as a pattern of the core (causal, a
window, nothing): it is asked about the partly seen blocks alone, so that nothing of size
len_q x len_kv is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.errors import PlanError, ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse

BLOCKS_AT_ONCE = 64
"""Partly seen blocks that the mask function is asked about at once."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImportedBlocks:
    """What a `BlockMask` says.

    Attributes
    ----------
    structures : tuple of tuple of BlockSparse
        By batch entry and head; a single one of either serves all.
    mask : Mask
        The pattern inside the blocks: pass it as ``mask=``.
    """

    structures: tuple[tuple[BlockSparse, ...], ...]
    mask: Mask

    def plan(self, problem: AttentionProblem, head: HeadPlan | None = None) -> Plan:
        """Return a plan of these blocks for a problem with the same mask.

        Parameters
        ----------
        problem : AttentionProblem
        head : HeadPlan, optional
            Formats of all heads; default those of `HeadPlan`.

        Raises
        ------
        PlanError
            If the numbers of sequences, heads, query tiles or key blocks do not fit.
        """
        batch, heads = len(self.structures), len(self.structures[0])
        needed = len(problem.sequences), problem.heads_q
        if batch not in (1, needed[0]) or heads not in (1, needed[1]):
            raise PlanError(
                got=f"a block mask for {batch} batch entries x {heads} heads",
                needed=f"one for {needed[0]} x {needed[1]}, or 1 of either",
                do="make the BlockMask with B and H of the problem, or None",
            )
        base = head or HeadPlan(reason="blocks given by the caller")
        made = [[replace(base, structure=s) for s in row] for row in self.structures]
        plan = Plan(
            {(s, h): made[min(s, batch - 1)][min(h, heads - 1)] for s, h in problem.heads()},
            policy="blocks",
        )
        plan.check_fits(problem)
        return plan


def import_block_mask(block_mask: Any, mask: Mask | None = None) -> ImportedBlocks:
    """Read a ``torch.nn.attention.flex_attention.BlockMask``.

    Parameters
    ----------
    block_mask : BlockMask
        Its lists are copied to the host.
    mask : Mask, optional
        What its mask function means inside the blocks. If left out, no mask and the causal one
        from the top left (``q_idx >= kv_idx``) are tried.

    Returns
    -------
    ImportedBlocks

    Raises
    ------
    ShapeError
        If the lists name blocks twice or outside the mask.
    UnsupportedError
        If the mask function, in a block that is seen in part, says something else than the
        pattern; or if the pattern hides keys of a block that is to be seen whole.

    Notes
    -----
    A `BlockMask` defines what attention is; a plan approximates it. The output is the same, but
    a certificate of the plan counts keys outside the blocks, if `mask` shows them, as an error.

    Examples
    --------
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> def causal(b, h, q, kv):
    ...     return q >= kv
    >>> blocks = create_block_mask(causal, None, None, 512, 512, device="cpu")
    >>> imported = import_block_mask(blocks)
    >>> imported.structures[0][0].blocks
    ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3))
    >>> imported.mask.is_causal
    True
    """
    lists = _Lists.of(block_mask)
    patterns = [mask] if mask is not None else [Mask.none(), Mask.causal("top_left")]
    problems = []
    for pattern in patterns:
        fault = _fault(lists, pattern, block_mask.mask_mod, block_mask.kv_indices.device)
        if fault is None:
            return ImportedBlocks(lists.structures(), pattern)
        problems.append(f"{pattern.describe()}: {fault}")
    raise UnsupportedError(
        got="a BlockMask that says otherwise than " + "; ".join(problems),
        needed="a pattern (causal, window, none) that holds inside its blocks",
        do="pass mask= with the pattern, or a boolean mask in place of the BlockMask",
    )


@dataclass(frozen=True, slots=True)
class _Lists:
    """Blocks of every (batch, head, query tile), as flat arrays of numbers."""

    batch: int
    heads: int
    len_q: int
    len_kv: int
    tile_q: int
    tile_kv: int
    partial: tuple[Ints, Ints, Ints, Ints]
    full: tuple[Ints, Ints, Ints, Ints]

    @classmethod
    def of(cls, block_mask: Any) -> _Lists:
        len_q, len_kv = (int(n) for n in block_mask.shape[-2:])
        tile_q, tile_kv = (int(n) for n in block_mask.BLOCK_SIZE)
        partial = _flat(block_mask.kv_num_blocks, block_mask.kv_indices)
        shape = _four(block_mask.kv_indices).shape
        full = (np.empty(0, np.int64),) * 4
        if block_mask.full_kv_num_blocks is not None:
            full = _flat(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        lists = cls(int(shape[0]), int(shape[1]), len_q, len_kv, tile_q, tile_kv, partial, full)
        lists._check(int(shape[2]))
        return lists

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.len_q // self.tile_q), -(-self.len_kv // self.tile_kv)

    def _all(self) -> tuple[Ints, ...]:
        joined = (np.concatenate(pair) for pair in zip(self.partial, self.full, strict=True))
        return tuple(joined)

    def _check(self, tiles_q: int) -> None:
        every = self._all()
        block = every[3]
        outside = ((block < 0) | (block >= self.tiles[1])).any() or tiles_q != self.tiles[0]
        if outside or len(np.unique(np.stack(every), axis=1).T) != len(block):
            raise ShapeError(
                got=f"{tiles_q} query tiles and key blocks up to {block.max(initial=-1)}"
                + ("" if outside else ", some of them twice"),
                needed=f"{self.tiles[0]} tiles, key blocks below {self.tiles[1]}, each once",
                do="make the BlockMask with create_block_mask or from_kv_blocks",
            )

    def structures(self) -> tuple[tuple[BlockSparse, ...], ...]:
        """One structure per batch entry and head."""
        tiles = self.tiles[0]
        b, h, tile, block = self._all()
        row = (b * self.heads + h) * tiles + tile
        order = np.lexsort((block, row))
        counts = np.bincount(row, minlength=self.batch * self.heads * tiles)
        split = [tuple(x.tolist()) for x in np.split(block[order], np.cumsum(counts)[:-1])]
        sizes = {"tile_q": self.tile_q, "tile_kv": self.tile_kv, "group": self.tile_q}
        flat = [
            BlockSparse(blocks=tuple(split[first : first + tiles]), **sizes)
            for first in range(0, len(counts), tiles)
        ]
        return tuple(
            tuple(flat[first : first + self.heads]) for first in range(0, len(flat), self.heads)
        )


def _four(x: torch.Tensor) -> torch.Tensor:
    """With a batch and a head axis in front, if they were left out."""
    return x.reshape((1,) * max(4 - x.dim(), 0) + tuple(x.shape))


def _flat(counts: torch.Tensor, indices: torch.Tensor) -> tuple[Ints, Ints, Ints, Ints]:
    """Batch, head, query tile and key block of every block in the lists."""
    listed = _four(indices).cpu().numpy().astype(np.int64)
    number = counts.reshape(listed.shape[:3]).cpu().numpy()
    if (number < 0).any() or (number > listed.shape[3]).any():
        raise ShapeError(
            got=f"{number.max(initial=0)} blocks in lists of {listed.shape[3]}",
            needed="counts from 0 to the length of the lists",
            do="make the BlockMask with create_block_mask or from_kv_blocks",
        )
    used = np.nonzero(np.arange(listed.shape[3]) < number[..., None])
    return used[0], used[1], used[2], listed[used]


def _fault(
    lists: _Lists, pattern: Mask, mask_mod: Callable[..., Any], device: Any
) -> str | None:
    """Where the pattern and the block mask differ; None if nowhere."""
    start, stop = pattern.intervals(lists.len_q, lists.len_kv)
    edges = np.arange(0, lists.len_q, lists.tile_q)
    if len(lists.full[3]):
        latest, earliest = np.maximum.reduceat(start, edges), np.minimum.reduceat(stop, edges)
        _, _, tile, block = lists.full
        first = block * lists.tile_kv
        last = np.minimum(first + lists.tile_kv, lists.len_kv)
        hidden = np.flatnonzero((latest[tile] > first) | (earliest[tile] < last))
        if len(hidden):
            return (
                f"hides keys of block {block[hidden[0]]}, seen whole by tile {tile[hidden[0]]}"
            )
    for tile, block, differs in _differences(lists, start, stop, mask_mod, device):
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            return f"another key is seen in block {block[at]} of tile {tile[at]}"
    return None


def _differences(
    lists: _Lists, start: Ints, stop: Ints, mask_mod: Callable[..., Any], device: Any
) -> Iterator[tuple[Ints, Ints, NDArray[np.bool_]]]:
    """Whether the mask function differs from row intervals in each partly seen block.

    It is asked where the lists are: it may read tensors of its own there.
    """
    ask = mask_mod
    for axes in ((None, None, None, 0), (None, None, 0, None), (0, 0, 0, 0)):
        ask = torch.vmap(ask, in_dims=axes)
    for begin in range(0, len(lists.partial[3]), BLOCKS_AT_ONCE):
        b, h, tile, block = (x[begin : begin + BLOCKS_AT_ONCE] for x in lists.partial)
        rows = tile[:, None] * lists.tile_q + np.arange(lists.tile_q)
        keys = block[:, None] * lists.tile_kv + np.arange(lists.tile_kv)
        inside = (rows < lists.len_q)[:, :, None] & (keys < lists.len_kv)[:, None]
        # A mask function may read tensors at its arguments: none lies outside the lengths.
        rows, keys = np.minimum(rows, lists.len_q - 1), np.minimum(keys, lists.len_kv - 1)
        said = ask(
            *(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (b, h, rows, keys))
        )
        first, last = start[rows][:, :, None], stop[rows][:, :, None]
        meant = (keys[:, None] >= first) & (keys[:, None] < last)
        yield tile, block, ((said.cpu().numpy() != meant) & inside).any(axis=(1, 2))
