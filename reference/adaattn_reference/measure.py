"""Measuring a head: exact rows at a few sampled places, and what candidates would make of them.

Rows that choose landmarks and rows that judge the choice are drawn apart, so the estimates are
not flattered by their own training data. Nothing here certifies: certificates draw fresh rows
after the plan is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import (
    relative_terms,
    rms_estimate,
    rms_norm_estimate,
    row_norms_estimate,
)
from adaattn_core.plan import HeadPlan
from adaattn_core.stats import HeadStats, MeasureRequest, StructureEstimate
from adaattn_core.structure import BlockSparse, Landmark, LowRank, ScoreSkip, Structure
from adaattn_reference.blocks import exact_scores, key_blocks, softmax_in_place
from adaattn_reference.farfield import FarField, GroupProbe, far_field, probe_head
from adaattn_reference.geometry import Geometry
from adaattn_reference.linalg import eigh, gram
from adaattn_reference.operands import Operands, prepare_operands
from adaattn_reference.quantise import TINY
from adaattn_reference.score_skip import visiting_order
from adaattn_reference.svd import score_factors
from adaattn_reference.view import HeadView

Float = NDArray[np.floating[Any]]

JUDGE_ROWS = 128
"""Held-out rows per head on which candidates are judged."""
JUDGE_PARTS = 4
"""Stretches of the sequence that these rows come from."""
ALIKE = 1.25
"""Landmark structures whose shares lie within this factor are alike: the safer one is tried."""
SKIP_ROWS = 128
"""Rows of a tile that show which keys it would skip."""
STATS_STEP = 4
"""Every so many of them give entropy, saturation and magnitudes, which need fewer rows."""
CURVE = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Unrepresented masses at which the landmark curve is read off."""


class HeadProbe:
    """Probe rows of one head, kept so that the run need not compute them again."""

    def __init__(self, geometry: Geometry | None, probes: list[GroupProbe]) -> None:
        self.geometry = geometry
        self.probes = probes

    def serves(self, structure: Structure) -> bool:
        """Whether a run of `structure` would draw the same rows and split the same fields."""
        if self.geometry is None or not isinstance(structure, Landmark):
            return False
        mine = self.geometry.structure
        names = ("group", "clusters", "samples", "band", "tile", "pool", "fitted")
        return all(getattr(mine, name) == getattr(structure, name) for name in names)


def measure_head(view: HeadView, request: MeasureRequest) -> tuple[HeadStats, HeadProbe]:
    """Measure what `request` asks for on one head."""
    facts: dict[str, Any] = {
        "len_q": view.len_q,
        "len_kv": view.len_kv,
        "dim_qk": view.query.shape[1],
        "dim_v": view.value.shape[1],
        "visible": view.visible,
        "nonfinite": not view.regular,
        "query_norm_upper": view.query_norm_upper,
        "key_norm_upper": float(view.seen(view.kv.key_norm).max(initial=0.0)),
        "value_norm_upper": float(view.seen(view.kv.value_norm).max(initial=0.0)),
    }
    if not view.live.any() or not view.regular:
        return HeadStats(**facts), HeadProbe(None, [])
    operands = prepare_operands(view, HeadPlan(), request.seed)
    landmarks = [s for s in request.structures if isinstance(s, Landmark)]
    geometry = Geometry.of(view, landmarks[0]) if landmarks else None
    if geometry is not None and not view.live[: geometry.tail.start].any():
        geometry = None  # all rows that see a key are in the tail: it is computed densely
    probes = probe_head(view, geometry, request.seed) if geometry else []
    if geometry:
        facts["landmark_curve"] = _landmark_curve(probes)
    judge = _Judge(view, operands, request, geometry)
    facts |= judge.row_facts()
    estimates = judge.landmarks(landmarks, probes) if geometry else []
    settled = any(
        e.row_error_estimate <= request.enough_error and e.share <= request.enough_share
        for e in estimates
    )
    for structure in request.structures:
        if isinstance(structure, ScoreSkip):
            if not settled:
                estimates.append(judge.score_skip(structure))
                settled = estimates[-1].row_error_estimate <= request.enough_error
        elif isinstance(structure, BlockSparse):
            estimates.append(judge.block_sparse(structure))
    if request.formats:
        facts["format_errors"] = judge.formats(request.formats)
    if request.spectrum:
        ranks = [s.rank for s in request.structures if isinstance(s, LowRank)]
        facts |= _spectral_facts(view, ranks)
        estimates += [
            StructureEstimate(
                structure=LowRank(rank),
                share=1.0,
                rank=rank,
                row_error_estimate=min(2.0, 2 * np.tanh(residual / 2)),
                frobenius_estimate=float("nan"),
            )
            for rank, residual in facts["feature_residual_upper"].items()
        ]
    stats = HeadStats(**facts, structures=tuple(estimates), sampled_rows=len(judge.rows))
    return stats, HeadProbe(geometry, probes)


class _Judge:
    """Held-out rows of a head with their exact outputs."""

    def __init__(
        self,
        view: HeadView,
        operands: Operands,
        request: MeasureRequest,
        geometry: Geometry | None,
    ) -> None:
        self.view, self.operands, self.request, self.geometry = (
            view,
            operands,
            request,
            geometry,
        )
        groups = geometry.groups() if geometry else _parts(view.len_q)
        usable = np.array([g for g, rows in enumerate(groups) if view.live[rows].any()])
        picked = np.unique(np.linspace(len(usable) - 1, 0, JUDGE_PARTS).round().astype(int))
        self.groups = [(int(g), groups[g]) for g in usable[picked]]
        rng = np.random.default_rng((request.seed, 3))
        count = -(-JUDGE_ROWS // len(self.groups))
        live = [np.flatnonzero(view.live[g]) + g.start for _, g in self.groups]
        self.parts: list[NDArray[np.int64]] = [
            np.sort(rng.choice(rows, min(count, len(rows)), replace=False)) for rows in live
        ]
        self.rows = np.concatenate(self.parts)
        self._tiles: dict[int, list[tuple[slice, Float, Float]]] = {}
        self.weights: list[Float] = []
        exact, self.lse = [], []
        tops, entropies, largest = [], [], []
        for (_, group), rows in zip(self.groups, self.parts, strict=True):
            keys = geometry.keys_of(group) if geometry else view.len_kv
            scores = exact_scores(view, rows, keys)
            few = scores[::STATS_STEP]
            tops.append(np.abs(np.where(few == -np.inf, 0, few)).max(initial=0.0))
            weights, lse = softmax_in_place(scores)
            weights = weights.copy()
            few = weights[::STATS_STEP]
            entropies.append(-(few * np.log(np.maximum(few, TINY))).sum(axis=1))
            largest.append(few.max(axis=1, initial=0.0))
            exact.append(weights @ operands.value[:keys])
            self.weights.append(weights)
            self.lse.append(lse)
        self.exact = exact
        # The unit of certificates counts the rows that see nothing, as rows of zeros.
        live_share = float(np.mean(view.live))
        self.rms = rms_norm_estimate(np.concatenate(exact)) * live_share**0.5
        self.score_max = float(max(tops))
        self.entropy = np.concatenate(entropies)
        self.largest = np.concatenate(largest)

    def row_facts(self) -> dict[str, float]:
        """Entropy, saturation and magnitudes of the held-out rows."""
        rows = np.concatenate([part[::STATS_STEP] for part in self.parts])
        counts = (self.view.stop - self.view.start)[rows]
        limit = np.log(np.maximum(counts, 2))
        return {
            "entropy": float(self.entropy.mean()),
            "entropy_relative": float((self.entropy / limit).mean()),
            "score_max_abs": self.score_max,
            "saturation": float(self.largest.mean()),
            "output_rms_estimate": self.rms,
        }

    def _estimate(
        self, structure: Structure, share: float, rank: int, errors: Sequence[Float]
    ) -> StructureEstimate:
        """Summarise the error norms of the held-out rows."""
        return StructureEstimate(
            structure=structure,
            share=min(share, 1.0),
            rank=rank,
            row_error_estimate=self._row_error(errors),
            frobenius_estimate=self._in_units(rms_estimate(np.concatenate(errors))),
        )

    def _row_error(self, errors: Sequence[Float]) -> float:
        """Error at the budget's row quantile; inf where it is not a number."""
        return self._in_units(float(np.quantile(np.concatenate(errors), self.request.rows)))

    def _in_units(self, error: float) -> float:
        """Relative to the rms output row: 0/0 is 0, what is not a number is inf."""
        return relative_terms({"error": error}, self.rms)["error"]

    def landmarks(
        self, structures: list[Landmark], probes: list[GroupProbe]
    ) -> list[StructureEstimate]:
        """Try landmark structures, cheapest first, until one is accurate enough."""
        assert self.geometry is not None
        out: list[StructureEstimate] = []
        shares = [
            self._landmark_share([probe.landmark_count(s.tau) for probe in probes])
            for s in structures
        ]
        for number, structure in enumerate(structures):
            share = shares[number]
            if share * ALIKE > min(shares[number + 1 :], default=np.inf):
                continue  # the next one is safer and costs no more
            errors, columns = [], []
            for part, (index, _) in enumerate(self.groups):
                far = far_field(self.operands, self.geometry, probes[index], structure.tau)
                columns.append(far.columns())
                errors.append(self._landmark_errors(part, probes[index], far))
            out.append(self._estimate(structure, share, round(np.mean(columns)), errors))
            if out[-1].row_error_estimate <= self.request.enough_error:
                break
        return out

    def _landmark_errors(self, part: int, probe: GroupProbe, far: FarField) -> Float:
        """Error norms of one part's rows under near field + landmarks + pools."""
        assert self.geometry is not None
        rows, weights = self.parts[part], self.weights[part]
        cluster = probe.cluster_of[rows - self.groups[part][1].start]
        keys = weights.shape[1]
        start, stop = self.geometry.near_of_rows(rows)
        columns = np.arange(keys)
        kept = (columns >= start[:, None]) & (columns < stop[:, None])
        kept[np.arange(len(rows))[:, None], far.landmarks[cluster]] = True
        part_weights = np.where(kept, weights, 0)
        sums = part_weights @ self.operands.value[:keys]
        total = part_weights.sum(axis=1)
        pools = far.pool_bias.shape[1]
        if pools:
            is_far = self.geometry.far_pools(rows, pools)
            query = self.operands.query[rows][:, :, None]
            scores = np.matmul(far.pool_key[cluster], query)[:, :, 0] + far.pool_bias[cluster]
            scores -= self.lse[part][:, None]
            pooled = np.where(is_far, np.exp(np.minimum(scores, 20.0)), 0)
            sums += np.matmul(pooled[:, None], far.pool_value[cluster])[:, 0]
            total += pooled.sum(axis=1)
        approximate = sums / np.maximum(total, TINY)[:, None]
        return row_norms_estimate(approximate - self.exact[part])

    def _landmark_share(self, counts: list[int]) -> float:
        """Share of visible scores that near field, landmarks and pools come to."""
        assert self.geometry is not None
        structure, view = self.geometry.structure, self.view
        rows = np.arange(view.len_q)
        start, stop = self.geometry.near_of_rows(rows)
        near = np.clip(np.minimum(stop, view.stop) - start, 0, None).sum()
        pools = (start // structure.pool).sum() if structure.pool else 0
        far = sum(
            count * (group.stop - group.start)
            for count, group in zip(counts, self.geometry.groups(), strict=True)
        )
        return float(near + pools + far) / max(view.visible, 1)

    def score_skip(self, structure: ScoreSkip) -> StructureEstimate:
        """Skip keys for a few whole tiles of rows, as a run would."""
        kept = seen = 0
        errors = []
        for tile, weights, exact in self._skip_tiles(structure.tile_q):
            keys = _kept_keys(self.view, tile, weights, structure)
            kept += len(keys)
            seen += weights.shape[1]
            part = weights[:, keys]
            sums = part @ self.operands.value[keys]
            total = np.maximum(part.sum(axis=1), TINY)
            errors.append(row_norms_estimate(sums / total[:, None] - exact))
        return self._estimate(structure, kept / max(seen, 1), 0, errors)

    def _skip_tiles(self, size: int) -> list[tuple[slice, Float, Float]]:
        """Rows, softmax weights and exact outputs of the last tile of rows and of a middle one.

        Of a large tile evenly spaced rows stand for all: they need fewer keys than the whole
        tile, so their errors are estimated a little high and the share a little low.
        """
        if size not in self._tiles:
            view = self.view
            tiles: list[tuple[slice, Float, Float]] = []
            live = np.flatnonzero(view.live) + 1
            for stop in {int(live[-1]), int(live[len(live) // 2])}:
                tile = slice(max(stop - size, 0), stop)
                rows = np.arange(tile.start, stop, max(size // SKIP_ROWS, 1))
                keys = int(view.stop[rows].max())
                weights = softmax_in_place(exact_scores(view, rows, keys))[0].copy()
                tiles.append((tile, weights, weights @ self.operands.value[:keys]))
            self._tiles[size] = tiles
        return self._tiles[size]

    def block_sparse(self, structure: BlockSparse) -> StructureEstimate:
        """Error of chosen blocks on the held-out rows."""
        blocks = key_blocks(self.view, structure, self.request.seed)
        errors, kept_scores = [], 0
        for part, rows in enumerate(self.parts):
            weights = self.weights[part]
            tiles, of_row = np.unique(rows // structure.tile_q, return_inverse=True)
            kept = [blocks.holds(int(tile), 0, weights.shape[1]) for tile in tiles]
            keep = np.stack(kept)[of_row]
            part_weights = np.where(keep, weights, 0)
            kept_scores += int((keep & (weights > 0)).sum())
            total = np.maximum(part_weights.sum(axis=1), TINY)
            out = part_weights @ self.operands.value[: weights.shape[1]] / total[:, None]
            errors.append(row_norms_estimate(out - self.exact[part]))
        seen = int((self.view.stop - self.view.start)[self.rows].sum())
        return self._estimate(structure, kept_scores / max(seen, 1), 0, errors)

    def formats(self, pairs: tuple[tuple[str, str], ...]) -> dict[tuple[str, str], float]:
        """Row error at the budget's quantile of every (qk, pv) pair, on the held-out rows."""
        out = {}
        for qk, pv in pairs:
            plan = HeadPlan(qk=qk, pv=pv)
            operands = prepare_operands(self.view, plan, self.request.seed)
            errors = []
            for part, rows in enumerate(self.parts):
                keys = self.weights[part].shape[1]
                scores = operands.scores(rows, slice(0, keys))
                self.view.mask_scores(scores, rows, 0, keys)
                top = scores.max(axis=1, initial=-np.inf)
                weights = np.exp(scores - np.where(top == -np.inf, 0, top)[:, None])
                total = np.maximum(weights.sum(axis=1), TINY)
                sums = operands.weighted_sum(weights, operands.value[:keys])
                errors.append(row_norms_estimate(sums / total[:, None] - self.exact[part]))
            out[qk, pv] = self._row_error(errors)
        return out


def _kept_keys(
    view: HeadView, tile: slice, weights: Float, structure: ScoreSkip
) -> NDArray[np.int64]:
    """Keys that a run of score-then-skip keeps, from the softmax weights of some of its rows.

    A weight is exp(score - final log-sum-exp), so the running log-sum-exp is the log of the
    weights kept so far.
    """
    size, found = structure.tile_kv, [np.empty(0, np.int64)]
    running = np.zeros((len(weights), 1), weights.dtype)
    for first, last in visiting_order(view, tile, size):
        chunk = weights[:, first:last]
        if not chunk.shape[1]:
            continue  # keys that none of these rows reaches
        needed = np.asarray((chunk > structure.lam * running).any(axis=0))
        edges = np.arange(0, len(needed), size)
        counts = np.diff(np.append(edges, len(needed)))
        needed = np.repeat(np.logical_or.reduceat(needed, edges), counts)
        running += chunk[:, needed].sum(axis=1, keepdims=True)
        found.append(first + np.flatnonzero(needed))
    return np.sort(np.concatenate(found))


def _parts(len_q: int) -> list[slice]:
    """Cut the rows into about JUDGE_PARTS stretches."""
    size = max(-(-len_q // JUDGE_PARTS), 1)
    return [slice(a, min(a + size, len_q)) for a in range(0, len_q, size)]


def _landmark_curve(probes: list[GroupProbe]) -> dict[float, float]:
    """Unrepresented mass -> mean share of the far keys needed as landmarks."""
    shares = [probe.keys_needed(CURVE) / max(len(probe.rest), 1) for probe in probes]
    return dict(zip(CURVE, np.mean(shares, axis=0).tolist(), strict=True))


def _spectral_facts(view: HeadView, ranks: list[int]) -> dict[str, Any]:
    """Spectral proxies of the centred visible keys, and score residuals of projections.

    Proxies that cannot be found stay unmeasured.
    """
    key = view.seen(view.key)
    facts: dict[str, Any] = {
        "feature_residual_upper": {
            rank: score_factors(view.query, key, rank).score_residual_upper * view.scale
            for rank in ranks
        },
    }
    found = eigh(gram(key))
    if found is not None:
        spectrum = np.maximum(found[0], 0)
        total, largest = float(spectrum.sum()), float(spectrum.max(initial=0.0))
        facts["stable_rank"] = total / max(largest, TINY)
        facts["participation_ratio"] = total**2 / max(float((spectrum**2).sum()), TINY)
    return facts
