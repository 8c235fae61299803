"""Heavy pools: blocks in which a key may hold much of a row's mass give up their keys.

A sketch of rank r predicts scores: queries and keys along the first r principal directions of
the keys. A block in which it says that a key holds more than `screen_theta` of a row of the
cluster is opened: its column is hidden from the cluster, and its keys are columns of their own.
"""

from __future__ import annotations

import math

import torch

from adaattn_torch.backend.far import HIDDEN, FarField
from adaattn_torch.backend.probing import Prober, row_edges


def heavy_keys(
    prober: Prober,
    places: list[int],
    far: FarField,
    rows: torch.Tensor,
    known: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of the far field after heavy pools were opened: keys, values, bias.

    Parameters
    ----------
    places : list of int
        Heads, by their number in the prober.
    rows : Tensor, shape (heads, clusters, rows)
    known : Tensor, shape (heads, clusters, rows)
        Log-sum-exp of near and far field, pools unopened.
    bias : Tensor, shape (heads, clusters, rows, columns)
        Of the columns so far.
    """
    structure, size = prober.geometry.structure, prober.geometry.step
    blocks, count = far.pool_bias.shape[2], far.landmarks.shape[2]
    key, value = prober.key[places], prober.value[places]
    heads = torch.arange(len(places), device=key.device)[:, None, None]
    owners = torch.tensor(places, device=key.device)[:, None, None]
    query = prober.operands.query[owners, rows] * prober.operands.scale
    gram = key.double().transpose(1, 2) @ key.double()
    basis = torch.linalg.eigh(gram).eigenvectors[:, :, -structure.screen_rank :].to(key.dtype)
    keys = min(blocks * size, key.shape[1])
    sketched = (query @ basis[:, None]) @ (key[:, :keys] @ basis)[:, None].transpose(2, 3)
    of_pools = bias[..., count:] > HIDDEN / 2
    sketched.scatter_(3, far.landmarks[:, :, None].expand(-1, -1, rows.shape[2], -1), -math.inf)
    over = sketched - known[..., None] > math.log(structure.screen_theta)
    pad = blocks * size - keys
    over = torch.nn.functional.pad(over, (0, pad)).unflatten(3, (blocks, size)).any(dim=4)
    opened = (over & of_pools).any(dim=2)  # (heads, clusters, blocks)
    most = int(opened.sum(dim=2).max()) if opened.numel() else 0
    landmark_key, landmark_value = key[heads, far.landmarks], value[heads, far.landmarks]
    closed = bias.clone()
    closed[..., count:] = torch.where(opened[:, :, None], HIDDEN, bias[..., count:])
    if not most:
        return (
            torch.cat([landmark_key, far.pool_key], 2),
            torch.cat([landmark_value, far.pool_value], 2), closed,
        )  # fmt: skip
    order = torch.argsort(opened.to(torch.int8), dim=2, descending=True, stable=True)
    picked = order[:, :, :most]
    is_open = opened.gather(2, picked)
    numbers = (picked[..., None] * size + torch.arange(size, device=key.device)).flatten(2)
    usable = is_open.repeat_interleave(size, dim=2) & (numbers < key.shape[1])
    numbers = numbers.clamp(max=key.shape[1] - 1)
    taken = torch.zeros(*far.landmarks.shape[:2], key.shape[1], dtype=torch.bool)
    taken = taken.to(key.device).scatter_(2, far.landmarks, True)
    usable &= ~taken.gather(2, numbers)
    start, stop = (row_edges(edge, rows)[..., None] for edge in prober.geometry.near_edges)
    sees = numbers[:, :, None] < start
    if not prober.geometry.causal:
        sees = sees | (numbers[:, :, None] >= stop)
    extra = torch.where(sees & usable[:, :, None], 0.0, HIDDEN).to(bias.dtype)
    return (
        torch.cat([landmark_key, far.pool_key, key[heads, numbers]], 2),
        torch.cat([landmark_value, far.pool_value, value[heads, numbers]], 2),
        torch.cat([closed, extra], 3),
    )  # fmt: skip
