"""Held-out rows of a few tiles, and what landmarks would make of them.

Where a few tiles show that a head needs more columns than can pay, it is left alone there: a
layer of such heads costs little more than dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaattn_core.stats import MeasureRequest, StructureEstimate
from adaattn_core.structure import Landmark
from adaattn_torch.backend.halves import merge
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.tiles import Strip
from adaattn_torch.backend.tiling import TiledHeads, Tiling

JUDGE_ROWS = 128
"""Held-out rows per head on which candidates are judged, as many of each tile."""
JUDGE_TILES = 10
"""Tiles that they come from, evenly spaced: rows of a tile err together."""
FIRST_TILES = (2, 5, 8)
"""Those that are looked at first, and the others where these say that landmarks may pay."""
FALL = 0.7
"""Power of the mass by which errors fall: heads that would miss by far are not tried again."""
ALMOST = 2.5
"""Error over the allowed one up to which a structure nearly does."""
STATS_STEP = 4
"""Every so many rows give entropy, saturation and magnitudes, which need fewer."""
CURVE = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Unrepresented masses at which the landmark curve is read off."""


@dataclass(eq=False)
class Part:
    """Held-out rows of some tiles, as many of each.

    Attributes
    ----------
    places : list of int
        Heads of the judge that they are of.
    strip : Strip
        What chooses the tiles' columns.
    query : Tensor, shape (heads, tiles, rows, dim_qk)
        Unscaled.
    own, own_lse : Tensor, shapes (heads, tiles, rows, dim_v), (heads, tiles, rows)
        Attention over the keys that are no columns: those of the tile under a causal mask.
    exact : Tensor, shape (heads, tiles, rows, dim_v)
    facts : list of dict of str to Tensor, shape (heads, some rows)
        By tile.
    known : dict of (float, int) to Tensor
        Error norms under landmarks of a mass, by head.
    numbers : dict of float to list of list of int
        Landmarks of every head and tile, by mass.
    """

    places: list[int]
    strip: Strip
    query: torch.Tensor
    own: torch.Tensor
    own_lse: torch.Tensor
    exact: torch.Tensor
    facts: list[dict[str, torch.Tensor]]
    known: dict[tuple[float, int], torch.Tensor] = field(default_factory=dict)
    numbers: dict[float, list[list[int]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, heads: TiledHeads, places: list[int], tiles: list[int], count: int, seed: int
    ) -> Part:
        """Draw `count` rows of each tile, and compute them exactly."""
        if len(places) < len(heads.owners):
            heads = heads.some(places)
        tiling, size = heads.tiling, heads.tiling.structure.tile
        queries, owns, own_sums, exacts, facts = [], [], [], [], []
        for tile in tiles:
            drawn = np.random.default_rng((seed, 3, tile)).permutation(size)[:count]
            rows = tile * size + np.sort(drawn)
            _, weights, lse = heads.weights(tile, rows)
            reach = tiling.reach(tile)
            own = tiling.own[tile] if tiling.causal else reach
            of_own = heads.values(weights[:, :, own:], slice(own, reach))
            near_total = weights[:, :, own:].sum(dim=2)
            owns.append(of_own / near_total.clamp_min(1e-30)[..., None])
            own_sums.append(near_total.log() + lse)
            exacts.append(heads.values(weights, slice(0, reach)))
            few = slice(None, None, STATS_STEP)
            facts.append(_facts(weights[:, few], lse[:, few], tiling, rows[few]))
            index = torch.from_numpy(rows).to(heads.query.device)
            queries.append(heads.query.index_select(1, index))
        strip = Strip.probe(heads, tiles, seed)
        query, own_out, own_lse, exact = (
            torch.stack(x, 1) for x in (queries, owns, own_sums, exacts)
        )
        return cls(places, strip, query, own_out, own_lse, exact, facts)

    def counts(self, tau: float, head: int) -> list[int]:
        """Landmarks of a head that leave a mass, by tile."""
        if tau not in self.numbers:
            chosen = self.strip.landmarks([tau] * len(self.places))
            self.numbers[tau] = chosen.sum(dim=2).tolist()
        return self.numbers[tau][self.places.index(head)]

    def error(self, tau: float, heads: list[int]) -> list[torch.Tensor]:
        """Error norms (rows of all tiles,) of some heads under landmarks of a mass."""
        missing = [head for head in heads if (tau, head) not in self.known]
        if missing:
            index = [self.places.index(head) for head in missing]
            columns = self.strip.columns([tau] * len(missing), index)
            outs, sums = [], []
            for number, place in enumerate(index):
                for tile in range(len(self.strip.tiles)):
                    out, lse, _ = columns.attend(number, tile, self.query[place, tile])
                    outs.append(out)
                    sums.append(lse)
            out, lse = (torch.stack(x).unflatten(0, (len(missing), -1)) for x in (outs, sums))
            if self.strip.heads.tiling.causal:
                near, near_lse = self.own[index], self.own_lse[index]
                merge(near, near_lse, out, lse)
                out = near
            missed = torch.linalg.vector_norm((out - self.exact[index]).double(), dim=3)
            for number, head in enumerate(missing):
                self.known[tau, head] = missed[number].flatten()
        return [self.known[tau, head] for head in heads]


def _facts(
    weights: torch.Tensor, lse: torch.Tensor, tiling: Tiling, rows: NDArray[np.int64]
) -> dict[str, torch.Tensor]:
    """Entropy, saturation and magnitude of rows, by head."""
    logs = weights.clamp_min(1e-30).log_()
    entropy = -(weights * logs).sum(dim=2)
    counts = np.full(len(rows), weights.shape[2])
    if tiling.causal:
        counts = rows + 1 + tiling.geometry.offset
    limit = torch.from_numpy(counts).to(weights).clamp_min(2).log()
    largest, least = (  # of visible keys: a weight of 0 has no score
        logs.amax(dim=2) + lse,
        torch.where(weights > 0, logs, 0.0).amin(dim=2) + lse,
    )
    return {
        "entropy": entropy,
        "entropy_relative": entropy / limit,
        "saturation": weights.amax(dim=2),
        "score_max_abs": torch.maximum(largest.abs(), least.abs()),
    }


@dataclass(eq=False)
class Judge:
    """Judges landmarks on some tiles of a sequence's heads."""

    heads: TiledHeads
    mask: SequenceMask
    request: MeasureRequest
    parts: list[Part] = field(default_factory=list)
    rms: dict[int, float] = field(default_factory=dict)

    def landmarks(self, structures: list[Landmark]) -> list[dict[str, Any]]:
        """Return stats by head: a few tiles first, the others for heads that may pay."""
        tiling, every = self.heads.tiling, list(range(len(self.heads.query)))
        places = (np.arange(JUDGE_TILES) + 0.5) / JUDGE_TILES * tiling.count
        tiles = np.unique(places.astype(int)).tolist()
        few = [tiles[n] for n in FIRST_TILES if n < len(tiles)] or tiles
        rest = [tile for tile in tiles if tile not in few]
        count = -(-JUDGE_ROWS // len(tiles))

        def look(some: list[int], places: list[int]) -> list[dict[str, Any]]:
            seed = self.request.seed
            self.parts.append(Part.of(self.heads, places, some, count, seed))
            return self._statistics(places)

        found = look(few, every)
        estimates = self._try(structures, every)
        pays = [n for n in every if not rest or self._may_pay(estimates[n])]
        if pays and rest:
            for n, said in zip(pays, look(rest, pays), strict=True):
                found[n] = said
            estimates = self._try(structures, pays)
        curves = self._curves(pays)
        for n in pays:
            found[n] |= {"structures": tuple(estimates[n]), "landmark_curve": curves[n]}
        return found

    def _may_pay(self, tried: list[StructureEstimate]) -> bool:
        """Whether a structure that keeps few enough scores is accurate, or nearly.

        The last one tried is the tightest; one that is fitted may be a little tighter still.
        """
        return (
            bool(tried) and tried[-1].row_error_estimate <= ALMOST * self.request.enough_error
        )

    def _statistics(self, places: list[int]) -> list[dict[str, Any]]:
        """Entropy, saturation and magnitudes of the held-out rows of some heads."""

        def of(part: Part, x: torch.Tensor) -> torch.Tensor:
            every = len(part.places) == len(places)
            return x if every else x[[part.places.index(place) for place in places]]

        exact = torch.cat([of(part, part.exact).flatten(1, 2) for part in self.parts], 1)
        rms = exact.double().square().sum(dim=2).mean(dim=1).sqrt().tolist()
        self.rms |= dict(zip(places, rms, strict=True))
        columns = {"output_rms_estimate": rms}
        for name in self.parts[0].facts[0]:
            found = torch.cat(
                [of(part, said[name]) for part in self.parts for said in part.facts], 1
            )
            largest = name == "score_max_abs"
            columns[name] = (found.amax(dim=1) if largest else found.mean(dim=1)).tolist()
        return [
            {name: float(column[n]) for name, column in columns.items()}
            | {"sampled_rows": exact.shape[1]}
            for n in range(len(places))
        ]

    def _try(
        self, structures: list[Landmark], left: list[int]
    ) -> dict[int, list[StructureEstimate]]:
        """Try structures on each head's held-out rows, cheapest first, until one is enough.

        Those that keep more scores than can pay are the last: tighter ones keep still more.
        """
        found: dict[int, list[StructureEstimate]] = {head: [] for head in left}
        enough, tiling = self.request.enough_error, self.heads.tiling
        pools = -(-tiling.geometry.len_kv // tiling.structure.pool) // 2
        for structure in structures:
            kept = {head: self._share(structure.tau, head) for head in left}
            left = [head for head in left if kept[head][0] <= self.request.most_share]
            if not left:
                break
            told = [part.error(structure.tau, left) for part in self.parts]
            missed = torch.stack([torch.cat(of_head) for of_head in zip(*told, strict=True)])
            errors = missed.cpu().numpy()
            typical = np.sqrt(np.mean(errors**2, axis=1))
            largest = np.quantile(errors, self.request.rows, axis=1)
            reach = (structures[-1].tau / structure.tau) ** FALL if structure.tau else 1.0
            again = []
            for n, head in enumerate(left):
                share, landmarks = kept[head]
                said = StructureEstimate(
                    structure=structure,
                    share=share,
                    rank=round(landmarks) + pools,
                    row_error_estimate=relative(float(largest[n]), self.rms[head]),
                    frobenius_estimate=relative(float(typical[n]), self.rms[head]),
                )
                found[head].append(said)
                if enough < said.row_error_estimate <= ALMOST * enough / reach:
                    again.append(head)
            left = again
        return found

    def _share(self, tau: float, head: int) -> tuple[float, float]:
        """Share of the visible scores that a head's columns come to, and its mean landmarks.

        Tiles that were not probed are taken to need as large a share of their far keys.
        """
        tiling, visible = self.heads.tiling, max(self.mask.visible, 1)
        tile, pool = tiling.structure.tile, tiling.structure.pool
        counts = [count for part in self.parts for count in part.counts(tau, head)]
        probed = sum(tiling.far(n) for part in self.parts for n in part.strip.tiles)
        far = sum(tiling.far(n) for n in range(tiling.count))
        near = sum(tiling.stop) - sum(tiling.start)
        near -= tiling.count * tile // 2 if tiling.causal else 0
        rest = self.mask.stop[tiling.rest] - self.mask.start[tiling.rest]
        scores = tile * (far * (sum(counts) / max(probed, 1) + 1 / pool) + near)
        return min((scores + float(rest.sum())) / visible, 1.0), float(np.mean(counts))

    def _curves(self, places: list[int]) -> dict[int, dict[float, float]]:
        """Unrepresented mass -> mean share of the far keys needed as landmarks, by head."""
        keys = [
            max(self.heads.tiling.far(n), 1) for part in self.parts for n in part.strip.tiles
        ]
        mean = {
            head: [
                float(np.mean(np.concatenate([p.counts(tau, head) for p in self.parts]) / keys))
                for tau in CURVE
            ]
            for head in places
        }
        return {head: dict(zip(CURVE, found, strict=True)) for head, found in mean.items()}


def relative(error: float, size: float) -> float:
    """Return error / size: 0/0 is 0, what is not a number is inf."""
    if error == 0:
        return 0.0
    found = error / size if size > 0 else math.inf
    return found if found == found else math.inf
