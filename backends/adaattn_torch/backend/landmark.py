"""Near field, landmarks and pools of some heads, as a few attention calls merged by lse.

The near fields of all tiles of a key/value head are one call, over overlapping windows of its
keys; landmarks and pools of a group's clusters are one call for all heads with as many of
them, the pools' bias and what is not far for a row coming in as an additive mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.errors import UnsupportedError
from adaattn_torch.backend import kernels
from adaattn_torch.backend.dense import attend
from adaattn_torch.backend.far import HIDDEN, FarField, columns_bias, far_field
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.operands import Operands
from adaattn_torch.backend.probing import Prober
from adaattn_torch.backend.screening import heavy_keys
from adaattn_torch.backend.tiles import attend_rest, attend_tiles
from adaattn_torch.backend.tiling import TiledHeads, Tiling


@dataclass(eq=False)
class LandmarkOutput:
    """What heads under landmarks returned.

    Attributes
    ----------
    out : Tensor, shape (heads, len_q, dim_v)
    lse : Tensor, shape (heads, len_q)
    share : list of float
        Share of the visible scores that each head computed.
    rank : list of int
        Mean number of its columns.
    dropped : float
        0 where the near field held everything, else inf: no theorem bounds what pools lose.
    """

    out: torch.Tensor
    lse: torch.Tensor
    share: list[float]
    rank: list[int]
    dropped: float


def refuse_mask() -> UnsupportedError:
    """Error for a mask that landmarks do not go with."""
    return UnsupportedError(
        got="the landmark structure under a window, boolean or additive mask",
        needed="a causal or full mask (key lengths and ragged batches included)",
        do="use dense for this head",
    )


def landmark_tiles(
    operands: Operands,
    heads: list[int],
    tiling: Tiling,
    mask: SequenceMask,
    taus: list[float],
    seed: int,
) -> LandmarkOutput:
    """Run some heads of a sequence whose tiles are groups of their own."""
    shape = (len(heads), tiling.geometry.len_q)
    out = operands.query.new_empty((*shape, operands.value.shape[2]))
    lse = operands.query.new_empty(shape)
    tiled = TiledHeads.of(operands, heads, tiling)
    scores, columns = attend_tiles(tiled, taus, seed, out, lse)
    attend_rest(tiled, out, lse)
    dense = float((mask.stop[tiling.rest] - mask.start[tiling.rest]).sum())
    return LandmarkOutput(
        out, lse,
        share=[min((n + dense) / max(mask.visible, 1), 1.0) for n in scores],
        rank=[round(n) for n in columns],
        dropped=0.0 if tiling.holds_all else float("inf"),
    )  # fmt: skip


def landmark(prober: Prober, mask: SequenceMask, taus: list[float]) -> LandmarkOutput:
    """Run a prober's heads, each with the landmarks that its tau asks for."""
    geometry, operands, heads = prober.geometry, prober.operands, len(prober.heads)
    out, lse = _near_fields(operands, geometry, mask)
    computed = np.full(heads, float(_near_scores(geometry, mask)))
    columns = np.zeros(heads)
    for number, _ in enumerate(prober.groups):
        counts = prober[number].landmark_counts(taus)
        far = far_field(prober, number, counts)
        columns += np.array(counts) + far.pool_bias.shape[2]
        for count in dict.fromkeys(counts):
            places = [n for n, own in enumerate(counts) if own == count]
            computed[places] += _add_far(prober, number, far, places, out, lse)
    tail = geometry.tail
    if tail.start < tail.stop:
        out[:, tail], lse[:, tail] = _dense_rows(operands, mask, tail)
        computed += float((mask.stop[tail] - mask.start[tail]).sum())
    dead = torch.from_numpy(mask.stop <= mask.start).to(out.device)
    out.masked_fill_(dead[:, None], 0)
    lse.masked_fill_(dead, -torch.inf)
    whole = geometry.near_holds_all(mask.stop)
    return LandmarkOutput(
        out, lse,
        share=[min(float(n) / max(mask.visible, 1), 1.0) for n in computed],
        rank=[round(float(n) / max(len(prober.groups), 1)) for n in columns],
        dropped=0.0 if whole else float("inf"),
    )  # fmt: skip


# -- the near field ----------------------------------------------------------------------------
def _near_fields(
    operands: Operands, geometry: Geometry, mask: SequenceMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row before the tail over the near field of its tile."""
    heads, len_q = operands.query.shape[:2]
    out = operands.query.new_zeros((heads, len_q, operands.value.shape[2]))
    lse = operands.query.new_full((heads, len_q), -torch.inf)
    tile, end = geometry.structure.tile, geometry.tail.start
    start, stop = geometry.near_edges
    first = np.arange(0, end, tile)
    where, width = _even_windows(geometry, first)
    if len(where):
        rows = slice(int(first[where[0]]), int(first[where[-1]]) + tile)
        _even_tiles(operands, mask, rows, int(start[rows.start]), width, tile, out, lse)
    for number in sorted(set(range(len(first))) - set(where.tolist())):
        rows = slice(int(first[number]), min(int(first[number]) + tile, end))
        low, high = int(start[rows.start]), int(stop[rows.start])
        if low < high:
            part = _window(operands, mask, rows, low, high)
            out[:, rows], lse[:, rows] = part
    return out, lse


def _even_windows(
    geometry: Geometry, first: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """Consecutive whole tiles whose windows of keys are of one width and evenly spaced.

    Parameters
    ----------
    first : ndarray of int64
        First row of every tile.

    Returns
    -------
    where : ndarray of int64
        Numbers of these tiles; none where fewer than two are consecutive.
    width : int
    """
    tile, end = geometry.structure.tile, geometry.tail.start
    start, stop = (edge[first] for edge in geometry.near_edges)
    ahead = start - first
    cut_free = np.flatnonzero((start > 0) & (first + tile <= end))
    if not len(cut_free):
        return cut_free, 0
    middle = cut_free[len(cut_free) // 2]
    width = int(stop[middle] - start[middle])
    even = (ahead == ahead[middle]) & (stop - start == width) & (first + tile <= end)
    where = np.flatnonzero(even & (start + width <= geometry.len_kv))
    if len(where) < 2 or (np.diff(where) != 1).any():
        return where[:0], 0
    return where, width


def _window(
    operands: Operands, mask: SequenceMask, rows: slice, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some rows over the keys low..high-1, as far as the rows see them."""
    sees = mask.inside(rows, low, high)
    bias = None
    if sees is not None:
        hidden = operands.query.new_full((), HIDDEN)
        bias = torch.where(sees, torch.zeros_like(hidden), hidden)[None, None]
    out, lse = kernels.masked(
        operands.query[None, :, rows], operands.key[None, :, low:high],
        operands.value[None, :, low:high], operands.scale, bias,
    )  # fmt: skip
    return out[0], lse[0]


def _even_tiles(
    operands: Operands,
    mask: SequenceMask,
    rows: slice,
    low: int,
    width: int,
    tile: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Near fields of consecutive tiles whose windows are evenly spaced, written in place."""
    sees = mask.inside(slice(rows.start, rows.start + tile), low, low + width)
    bias = None
    hidden = operands.query.new_full((), HIDDEN)
    if sees is not None:
        bias = torch.where(sees, torch.zeros_like(hidden), hidden)
    tiles, owners = (rows.stop - rows.start) // tile, _owners(operands)
    for places in owners:
        index = torch.tensor(places, device=out.device)
        count = len(places)
        query = operands.query[index, rows].unflatten(1, (tiles, tile))
        query = query.transpose(0, 1).reshape(1, tiles, count * tile, -1)
        key, value = (
            _windows(x[places[0]], low, width, tile, tiles)
            for x in (operands.key, operands.value)
        )
        added = None if bias is None else bias.repeat(count, 1)[None, None]
        part, part_lse = kernels.masked(query, key, value, operands.scale, added)
        part = part[0].unflatten(1, (count, tile)).transpose(0, 1)
        out[index, rows] = part.reshape(count, tiles * tile, -1)
        part_lse = part_lse[0].unflatten(1, (count, tile)).transpose(0, 1)
        lse[index, rows] = part_lse.reshape(count, tiles * tile)


def _owners(operands: Operands) -> list[list[int]]:
    """Heads by the keys that they share: each group's near fields go through one product."""
    found: dict[int, list[int]] = {}
    for place, owner in enumerate(operands.owner or range(len(operands.query))):
        found.setdefault(owner, []).append(place)
    return list(found.values())


def _windows(x: torch.Tensor, low: int, width: int, step: int, tiles: int) -> torch.Tensor:
    """Overlapping windows of x (len, dim): a view (1, tiles, width, dim)."""
    x = x.contiguous()
    dim = x.shape[1]
    size, stride = (1, tiles, width, dim), (0, step * dim, dim, 1)
    return x.as_strided(size, stride, x.storage_offset() + low * dim)


def _near_scores(geometry: Geometry, mask: SequenceMask) -> int:
    """Scores of the near fields that rows before the tail may see."""
    start, stop = (edge[: geometry.tail.start] for edge in geometry.near_edges)
    seen = np.minimum(stop, mask.stop[: geometry.tail.start]) - start
    return int(np.clip(seen, 0, None).sum())


def _dense_rows(
    operands: Operands, mask: SequenceMask, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    part = Operands(operands.query[:, rows], operands.key, operands.value, operands.scale)
    out, lse, _ = attend(part, mask.rows(np.arange(rows.start, rows.stop)))
    return out, lse


# -- the far field -----------------------------------------------------------------------------
def _add_far(
    prober: Prober,
    number: int,
    far: FarField,
    places: list[int],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> float:
    """Merge a group's far field into what its rows have seen, of heads with as many landmarks.

    Returns the scores computed, of one head.
    """
    clusters = prober[number].clusters
    sizes = [c.shape[1] for c in clusters]
    computed = 0.0
    for size in dict.fromkeys(sizes):
        numbers = [n for n, found in enumerate(sizes) if found == size]
        part = far.part(places, numbers)
        if part.landmarks.shape[2] + part.pool_bias.shape[2]:
            rows = torch.stack([clusters[n][places] for n in numbers], 1)
            computed += _add_part(prober, part, places, rows, out, lse)
    return computed


def _add_part(
    prober: Prober,
    far: FarField,
    places: list[int],
    rows: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> float:
    """Merge the columns of clusters of one size, whose rows are (heads, clusters, rows)."""
    heads = torch.tensor(places, device=out.device)[:, None, None]
    where = heads, rows
    query = prober.operands.query[where]
    key = torch.cat([prober.key[heads, far.landmarks], far.pool_key], dim=2)
    value = torch.cat([prober.value[heads, far.landmarks], far.pool_value], dim=2)
    bias = columns_bias(far, prober, rows, query.dtype)
    near, near_lse = out[where], lse[where]
    structure, scale = prober.geometry.structure, prober.operands.scale
    if structure.screen_rank and structure.pool:
        known = torch.logaddexp(near_lse, kernels.masked(query, key, value, scale, bias)[1])
        key, value, bias = heavy_keys(prober, places, far, rows, known, bias)
    part, part_lse = kernels.masked(query, key, value, scale, bias)
    total = torch.logaddexp(near_lse, part_lse)
    sound = torch.where(total < HIDDEN / 2, 0.0, total)
    near *= (near_lse - sound).exp_()[..., None]
    near += part.mul_((part_lse - sound).exp_()[..., None])
    out[where], lse[where] = near, total
    return float((bias > HIDDEN / 2).sum()) / len(places)
