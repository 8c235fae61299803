"""Clusters of like queries, of all heads at once: rows that look for the same far keys.

The rows of a group are halved again and again, each time along the direction in which their
scores differ most, into equal parts. With ``L L^T`` the covariance of the keys,
``|L^T (q - q')|^2`` is the mean squared difference of the scores of two queries.
"""

from __future__ import annotations

import torch

DIRECTIONS = 8
"""Principal directions of the scores that rows are compared along."""
LEAST_ROWS = 32
"""Rows below which a cluster is not worth landmarks of its own."""
COVARIANCE_ROWS = 1024
"""Rows, evenly spaced, from which covariances are computed."""
SQUARINGS = 4
"""Squarings of a covariance matrix that isolate its first direction well enough."""


def query_clusters(
    query: torch.Tensor, key: torch.Tensor, groups: list[slice], count: int
) -> list[list[torch.Tensor]]:
    """Split the rows of every group into `count` (a power of 2) clusters of equal size.

    Parameters
    ----------
    query : Tensor, shape (heads, len_q, dim)
    key : Tensor, shape (heads, len_kv, dim)

    Returns
    -------
    list of list of Tensor, shape (heads, rows)
        By group and cluster, fewer clusters where a group is short; rows that are left over
        are in the last one.
    """
    heads, device = len(query), query.device
    if count == 1:
        return [
            [torch.arange(g.start, g.stop, device=device).expand(heads, -1)] for g in groups
        ]
    points = _coordinates(query, key)
    sizes = [g.stop - g.start for g in groups]
    whole = sum(size == sizes[0] for size in sizes)  # all but perhaps the last
    out: list[list[torch.Tensor]] = []
    for part in (groups[:whole], groups[whole:]):
        if part:
            out += _split(points, part, count)
    return out


def _split(points: torch.Tensor, groups: list[slice], count: int) -> list[list[torch.Tensor]]:
    size = groups[0].stop - groups[0].start
    while count > 1 and size < count * LEAST_ROWS:
        count //= 2
    even = size - size % count
    heads, device = len(points), points.device
    first = torch.tensor([g.start for g in groups], device=device)
    rows = (first[:, None] + torch.arange(even, device=device)).expand(heads, -1, -1)
    rows = rows.reshape(heads * len(groups), even)
    owner = torch.arange(heads, device=device).repeat_interleave(len(groups))
    for _ in range(count.bit_length() - 1):
        along = _first_coordinate(points[owner[:, None], rows])
        order = along.argsort(dim=1, stable=True)
        rows = rows.gather(1, order).reshape(2 * len(rows), -1)
        owner = owner.repeat_interleave(2)
    by_group = rows.reshape(heads, len(groups), count, -1)
    clusters = []
    for number, group in enumerate(groups):
        parts = list(by_group[:, number].unbind(1))
        if even < size:
            left = torch.arange(group.start + even, group.stop, device=device)
            parts[-1] = torch.cat([parts[-1], left.expand(heads, -1)], dim=1)
        clusters.append(parts)
    return clusters


def _first_coordinate(points: torch.Tensor) -> torch.Tensor:
    """Coordinate of every point along its batch's first principal direction (batch, rows)."""
    centred = points - points.mean(dim=1, keepdim=True)
    power = torch.matmul(centred.transpose(1, 2), centred)
    tiny = torch.finfo(power.dtype).tiny
    for _ in range(SQUARINGS):
        trace = power.diagonal(dim1=1, dim2=2).sum(dim=1)
        power = power / trace.clamp_min(tiny)[:, None, None]
        power = torch.matmul(power, power)
    longest = power.square().sum(dim=1).argmax(dim=1)
    direction = power[torch.arange(len(power), device=power.device), :, longest]
    return torch.matmul(centred, direction[:, :, None])[:, :, 0]


def _coordinates(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Coordinates of all query rows along the first directions of their scores.

    The directions span the leading eigenvectors of L^T G L, with L a factor of the keys'
    covariance and G the queries': a few squarings find them well enough to compare rows by.
    """
    of_key, of_query = _gram(key), _gram(query)
    dim = of_key.shape[1]
    eye = torch.eye(dim, dtype=of_key.dtype, device=of_key.device)
    size = of_key.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] / dim
    factor, _ = torch.linalg.cholesky_ex(of_key + (1e-9 * size + 1e-30) * eye)
    spread = factor.transpose(1, 2) @ of_query @ factor
    count = min(DIRECTIONS, dim)
    for _ in range(SQUARINGS):
        trace = spread.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(1e-300)
        spread = spread / trace[:, None, None]
        spread = spread @ spread
    longest = spread.square().sum(dim=1).argsort(dim=1, descending=True)[:, :count]
    leading = spread.gather(2, longest[:, None].expand(-1, dim, -1))
    leading = leading / leading.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    directions = factor @ torch.linalg.qr(leading).Q
    largest = directions.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    peak = query.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    return (query / peak) @ (directions / largest).to(query.dtype)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """Second moments of evenly spaced rows about their mean, in float64, scaled to size 1."""
    some = x[:, :: max(x.shape[1] // COVARIANCE_ROWS, 1)].double()
    some = some / some.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    centred = some - some.mean(dim=1, keepdim=True)
    return centred.transpose(1, 2) @ centred
