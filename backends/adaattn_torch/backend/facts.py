"""Facts of the heads that were run: sizes of inputs and outputs, all heads at once."""

from __future__ import annotations

import torch

from adaattn_core.facts import Arithmetic, RunFacts
from adaattn_torch.backend.sequences import Sequence

_LARGEST = torch.finfo(torch.float64).max
_SAFE = (1e-15, 1e15)
"""Largest norms whose squares neither overflow float32 nor matter if they are lost."""
_RMS_SLACK = 1e-5
"""More than a float32 sum of squares may have gained, whatever its order."""


def output_sizes(out: torch.Tensor) -> list[float]:
    """Root-mean-square norms of rows (heads, len, dim), rounded down; NaN where not finite."""
    if not out.numel():
        return [0.0] * len(out)
    wide = out if out.dtype == torch.float64 else out.float()
    norms = torch.linalg.vector_norm(wide, dim=2)
    largest = norms.amax(dim=1)
    unit = torch.ones_like(largest)
    if not bool(((largest < _SAFE[1]) & (largest > _SAFE[0])).all()):
        low, high = torch.aminmax(wide.flatten(1), dim=1)
        largest = torch.maximum(-low, high)
        unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
        norms = torch.linalg.vector_norm(wide / unit[:, None, None], dim=2)
    squares = norms.double().square().mean(dim=1)
    sizes = squares.sqrt() * unit.double() * (1 - _RMS_SLACK)
    sizes = torch.where(torch.isfinite(largest), sizes.clamp(max=_LARGEST), torch.nan)
    return [float(x) for x in sizes.tolist()]


def facts_of(
    sequence: Sequence,
    heads: list[int],
    formats: tuple[str, str],
    out: torch.Tensor,
    arithmetic: Arithmetic,
    *,
    share: list[float] | None = None,
    rank: list[int] | None = None,
    dropped: float = 0.0,
) -> dict[int, RunFacts]:
    """Facts of some heads of a sequence that ran in the same way.

    Parameters
    ----------
    out : Tensor, shape (heads, len_q, dim_v)
        As returned.
    share, rank : list, optional
        Of each head; default 1 and 0.
    dropped : float
        Upper bound of the mass that was left out.
    """
    mask = sequence.mask
    columns: dict[str, list[float]] = {
        **sequence.sizes,
        **{name: x.tolist() for name, x in sequence.residuals(*formats).items()},
    }
    bias = [0.0] * len(sequence.query)
    if mask.bias is not None:
        bias = mask.known.bias_max_abs.expand(len(sequence.query)).tolist()
    live = bool(sequence.live.any())
    sizes = output_sizes(out)
    found = {}
    for number, head in enumerate(heads):
        size = sizes[number]
        finite = size == size
        found[head] = RunFacts(
            keys_max=mask.keys_max if live else 0,
            share=1.0 if share is None else share[number],
            rank=0 if rank is None else rank[number],
            **{name: column[head] for name, column in columns.items()},
            score_residual_upper=0.0,
            dropped_mass_upper=dropped,
            bias_max_abs=bias[head],
            arithmetic=arithmetic,
            output_rms=size if finite else 0.0,
            nonfinite=not finite,
        )
    return found


def input_facts(sequence: Sequence) -> dict[int, RunFacts]:
    """Facts of every head's inputs; nothing was rounded or left out, and nothing returned."""
    none = sequence.value.new_zeros((len(sequence.query), 1, 1))
    heads = list(range(len(none)))
    return facts_of(sequence, heads, ("f64", "f64"), none, Arithmetic())
