"""Measuring heads: exact rows at a few sampled places, and what candidates would make of them.

Rows that choose landmarks and rows that judge the choice are drawn apart. Landmarks are tried
where every tile is a group of its own (`tiles`): others are run, but nobody measures them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import Landmark
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.judging import JUDGE_ROWS, STATS_STEP, Judge, relative
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.operands import Operands, rounded
from adaattn_torch.backend.sequences import Sequence
from adaattn_torch.backend.tiling import TiledHeads, Tiling

NORMS = ("query_norm_upper", "key_norm_upper", "value_norm_upper")


def measure_sequence(sequence: Sequence, request: MeasureRequest) -> dict[int, HeadStats]:
    """Measure what `request` asks for on every head of a sequence."""
    facts = _plain_facts(sequence)
    sound = [h for h, said in facts.items() if not said["nonfinite"]]
    if sound and bool(sequence.live.any()):
        landmarks = [s for s in request.structures if isinstance(s, Landmark)]
        mask = sequence.mask
        tiling = Tiling.of(Geometry.of(mask, landmarks[0])) if landmarks else None
        if tiling is not None:
            heads = TiledHeads.of(sequence.operands(torch.float32), sound, tiling)
            told = Judge(heads, mask, request).landmarks(landmarks)
            for head, found in zip(sound, told, strict=True):
                facts[head] |= found
        else:
            for head in sound:
                facts[head] |= _without_landmarks(sequence, head, request)
    if request.spectrum:
        for head, found in _spectra(sequence, sound).items():
            facts[head] |= found
    return {head: HeadStats(**said) for head, said in facts.items()}


def _plain_facts(sequence: Sequence) -> dict[int, dict[str, Any]]:
    whole, mask = sequence.plain, sequence.mask
    columns = {name: x for name, x in sequence.sizes.items() if name in NORMS}
    return {
        head: {
            "len_q": mask.len_q,
            "len_kv": mask.len_kv,
            "dim_qk": whole.query.shape[2],
            "dim_v": whole.value.shape[2],
            "visible": mask.visible,
            "nonfinite": not (sequence.regular[head] and sequence.fits_float32),
            **{name: column[head] for name, column in columns.items()},
        }
        for head in range(len(whole.query))
    }


def _without_landmarks(
    sequence: Sequence, head: int, request: MeasureRequest
) -> dict[str, Any]:
    """Statistics and format errors of a head on held-out rows, under any mask."""
    live = sequence.live[head if len(sequence.live) > 1 else 0].cpu().numpy()
    rng = np.random.default_rng((request.seed, 3))
    seen = np.flatnonzero(live)
    if not len(seen):
        return {}
    rows = np.sort(rng.choice(seen, min(JUDGE_ROWS, len(seen)), replace=False))
    operands = sequence.operands(torch.float32).heads([head])
    mask = sequence.mask.heads([head]).rows(rows)
    picked = Operands(
        operands.query[:, torch.from_numpy(rows).to(operands.query.device)], operands.key,
        operands.value, operands.scale,
    )  # fmt: skip
    weights, scores = _weights(picked, mask)
    few, few_scores = weights[:, ::STATS_STEP], scores[:, ::STATS_STEP]
    entropy = -(few * few.clamp_min(1e-30).log()).sum(dim=2)
    visible = torch.isfinite(few_scores).sum(dim=2).clamp_min(2)
    exact = weights @ picked.value
    size = exact.double().square().sum(dim=2).mean().sqrt()
    rms = float(size) * float(np.mean(live)) ** 0.5
    found: dict[str, Any] = {
        "entropy": float(entropy.mean()),
        "entropy_relative": float((entropy / visible.log()).mean()),
        "score_max_abs": float(few_scores.masked_fill(few_scores == -math.inf, 0).abs().max()),
        "saturation": float(few.amax(dim=2).mean()),
        "output_rms_estimate": rms,
        "sampled_rows": len(rows),
    }
    errors: dict[tuple[str, str], float] = {}
    for qk, pv in request.formats:
        narrow = Operands(
            rounded(picked.query, qk), rounded(picked.key, qk), rounded(picked.value, pv),
            picked.scale,
        )  # fmt: skip
        others, _ = _weights(narrow, mask, pv)
        norms = torch.linalg.vector_norm((others @ narrow.value - exact).double(), dim=2)
        quantile = float(np.quantile(norms.cpu().numpy(), request.rows))
        errors[qk, pv] = relative(quantile, rms)
    return found | {"format_errors": errors}


def _weights(
    operands: Operands, mask: SequenceMask, pv: str = "f32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights, rounded to a format before they are normalised, and scores."""
    scores = operands.query @ operands.key.transpose(1, 2) * operands.scale
    added = mask.addend(slice(0, mask.len_q), 0, mask.len_kv, scores.dtype)
    if added is not None:
        scores = scores + added
    top = scores.amax(dim=2, keepdim=True)
    weights = (scores - torch.where(top == -math.inf, 0.0, top)).exp()
    total = weights.sum(dim=2, keepdim=True).clamp_min(1e-30)
    return rounded(weights, pv) / total, scores


def _spectra(sequence: Sequence, heads: list[int]) -> dict[int, dict[str, Any]]:
    """Spectral proxies of the centred visible keys; none of a head without keys."""
    found: dict[int, dict[str, Any]] = {}
    for head in heads:
        key = sequence.operands(torch.float64).heads([head]).key[0]
        if sequence.seen_keys is not None:
            seen = sequence.seen_keys
            key = key[seen[head if len(seen) > 1 else 0]]
        if not len(key):
            continue
        centred = key - key.mean(dim=0)
        values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
        total, largest = float(values.sum()), float(values.max())
        found[head] = {
            "stable_rank": total / max(largest, 1e-300),
            "participation_ratio": total**2 / max(float(values.square().sum()), 1e-300),
        }
    return found
