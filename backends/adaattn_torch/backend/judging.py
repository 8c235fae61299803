"""Held-out rows of a sequence's heads, and what landmarks would make of them.

Where two groups show that a head needs more columns than can pay, it is left alone there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from adaattn_core.stats import MeasureRequest, StructureEstimate
from adaattn_core.structure import Landmark
from adaattn_torch.backend.far import HIDDEN, far_field, far_pools
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.probing import (
    FEW_LANDMARKS,
    Prober,
    exact_weights,
    hide_near,
    scaled_rows,
)

JUDGE_ROWS = 120
"""Held-out rows per head on which candidates are judged, as many of each cluster."""
JUDGE_PARTS = 3
"""Groups that these rows come from, evenly spaced; all but the last, which has the most keys,
are looked at before anything else."""
FALL = 0.7
"""Power of the mass by which errors fall: heads that would miss by far are not tried again."""
ALMOST = 1.5
"""Error over the allowed one up to which a structure nearly does."""
STATS_STEP = 4
"""Every so many rows give entropy, saturation and magnitudes, which need fewer."""
CURVE = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Unrepresented masses at which the landmark curve is read off."""


@dataclass(eq=False)
class Part:
    """Held-out rows of one group, of some heads: as many of every cluster.

    Attributes
    ----------
    group : int
        Which group they are from.
    rows : Tensor, shape (heads, clusters, rows)
    query : Tensor, shape (heads, clusters, rows, dim_qk)
        Scaled.
    near, near_total : Tensor, shapes (heads, clusters, rows, dim_v), (heads, clusters, rows)
        Weighted values of the near field, and the sum of its weights.
    beyond : Tensor, shape (heads, clusters, rows, far keys)
        Exact softmax weights of far keys, 0 for near ones.
    lse : Tensor, shape (heads, clusters, rows)
    exact : Tensor, shape (heads, clusters, rows, dim_v)
    facts : dict of str to Tensor
        Entropy, largest weight and magnitude of some of the rows.
    errors : dict of (float, int) to Tensor
        Error norms under landmarks of a mass, by head.
    """

    group: int
    rows: torch.Tensor
    query: torch.Tensor
    near: torch.Tensor
    near_total: torch.Tensor
    beyond: torch.Tensor
    lse: torch.Tensor
    exact: torch.Tensor
    facts: dict[str, torch.Tensor]
    errors: dict[tuple[float, int], torch.Tensor] = field(default_factory=dict)

    def of_heads(self, places: list[int]) -> Part:
        """Return the rows of some heads."""
        place = {head: n for n, head in enumerate(places)}
        known = {(t, place[h]): x for (t, h), x in self.errors.items() if h in place}
        facts = {name: x[places] for name, x in self.facts.items()}
        return Part(
            self.group,
            self.rows[places],
            self.query[places],
            self.near[places],
            self.near_total[places],
            self.beyond[places],
            self.lse[places],
            self.exact[places],
            facts,
            known,
        )


class Judge:
    """Held-out rows of a prober's heads, and what landmarks would make of them."""

    def __init__(self, mask: SequenceMask, prober: Prober, request: MeasureRequest) -> None:
        self.prober, self.request, self.mask = prober, request, mask
        self.live_share = float(np.mean(self.mask.stop > self.mask.start))
        live = self.mask.stop > self.mask.start
        usable = [n for n, rows in enumerate(prober.groups) if live[rows].any()]
        picked = np.unique(np.arange(1, JUDGE_PARTS + 1) * len(usable) // JUDGE_PARTS - 1)
        self.groups = [usable[int(n)] for n in picked if n >= 0]
        self.parts: list[Part] = []

    def _look(self, groups: Iterable[int]) -> None:
        """Compute the held-out rows of some groups: as many of every cluster."""
        prober = self.prober
        for group in groups:
            clusters = prober[group].clusters
            size = min(members.shape[1] for members in clusters)
            rng = np.random.default_rng((self.request.seed, 3, group))
            count = -(-JUDGE_ROWS // (len(self.groups) * len(clusters)))
            drawn = np.argsort(rng.random((len(clusters), size)), axis=1)[:, :count]
            picks = torch.from_numpy(drawn).to(prober.key.device)
            rows = torch.stack([c[:, n] for c, n in zip(clusters, picks, strict=True)], 1)
            shape, every = rows.shape[1:], rows.flatten(1)
            query = scaled_rows(prober.operands, every)
            keys = prober.geometry.reached(prober.groups[group])
            weights, lse = exact_weights(query, prober.key, every, prober.geometry, keys)
            value = prober.value[:, :keys]
            exact, facts = torch.bmm(weights, value), self._facts(weights, lse, every)
            hide_near(weights, every, prober.geometry)
            beyond = weights[:, :, : prober.geometry.far_keys(prober.groups[group])]
            near = exact - torch.bmm(beyond, value[:, : beyond.shape[2]])
            near_total = 1 - beyond.sum(dim=2)
            part = Part(
                group,
                rows,
                query.unflatten(1, shape),
                near.unflatten(1, shape),
                near_total.unflatten(1, shape),
                beyond.unflatten(1, shape),
                lse.unflatten(1, shape),
                exact.unflatten(1, shape),
                facts,
            )
            self.parts.append(part)

    def _facts(
        self, weights: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Entropy, saturation and magnitude of some of the rows, by head."""
        few = weights[:, ::STATS_STEP]
        logs = few.clamp_min(1e-30).log()
        entropy = -(few * logs).sum(dim=2)
        counts = (self.mask.stop - self.mask.start)[rows[:, ::STATS_STEP].cpu().numpy()]
        limit = torch.from_numpy(counts).clamp_min(2).log().to(few)
        scores = torch.where(few > 0, logs + lse[:, ::STATS_STEP, None], 0.0)
        return {
            "entropy": entropy,
            "entropy_relative": entropy / limit,
            "saturation": few.amax(dim=2),
            "score_max_abs": scores.abs().amax(dim=2),
        }

    def landmarks(self, structures: list[Landmark]) -> dict[int, dict[str, Any]]:
        """Return stats by head: two parts first, the others for heads that may pay."""
        heads, every = self.prober.heads, list(range(len(self.prober.heads)))
        order = self.groups
        middle, rest = order[:-1] or order, order[-1:] if len(order) > 1 else []
        found: dict[int, dict[str, Any]] = {}
        self._look(middle)
        statistics = self._statistics()
        estimates = self._try(structures)
        pays = [n for n in every if not rest or self._may_pay(estimates[n])]
        for n in every:
            found[heads[n]] = statistics[n]
        if pays and rest:
            self.prober = self.prober.restricted(pays)
            self.parts = [part.of_heads(pays) for part in self.parts]
            heads, every = self.prober.heads, list(range(len(pays)))
            self._look(rest)
            statistics = self._statistics()
            estimates = self._try(structures)
        if not pays:
            return found
        for n, curve in enumerate(self._curves()):
            known = {"structures": tuple(estimates[n]), "landmark_curve": curve}
            found[heads[n]] = statistics[n] | known
        return found

    def _may_pay(self, tried: list[StructureEstimate]) -> bool:
        """Whether a structure that keeps few enough scores is accurate, or nearly.

        The last one tried is the tightest; one that is fitted may be a little tighter still.
        """
        return (
            bool(tried) and tried[-1].row_error_estimate <= ALMOST * self.request.enough_error
        )

    def _statistics(self) -> list[dict[str, Any]]:
        """Entropy, saturation and magnitudes of the held-out rows, by head."""
        exact = torch.cat([part.exact.flatten(1, 2) for part in self.parts], 1)
        rms = exact.double().square().sum(dim=2).mean(dim=1).sqrt()
        self.rms = (rms * self.live_share**0.5).tolist()
        columns = {"output_rms_estimate": self.rms}
        for name in self.parts[0].facts:
            found = torch.cat([part.facts[name] for part in self.parts], 1)
            largest = name == "score_max_abs"
            columns[name] = (found.amax(dim=1) if largest else found.mean(dim=1)).tolist()
        rows = sum(part.lse[0].numel() for part in self.parts)
        return [
            {name: float(column[n]) for name, column in columns.items()}
            | {"sampled_rows": rows}
            for n in range(len(self.rms))
        ]

    def _try(self, structures: list[Landmark]) -> list[list[StructureEstimate]]:
        """Try structures on each head's held-out rows, cheapest first, until one is enough.

        None is tried that keeps more scores than can pay: tighter ones keep still more.
        """
        found: list[list[StructureEstimate]] = [[] for _ in self.prober.heads]
        left = list(range(len(found)))
        for structure in structures:
            counts = [self._counts(structure.tau, part.group) for part in self.parts]
            shares = self._shares([list(own) for own in zip(*counts, strict=True)])
            left = [head for head in left if shares[head] <= self.request.most_share]
            if not left:
                break
            errors = self._errors(structure.tau, left)
            for n, head in enumerate(left):
                own = float(np.mean([of_part[head] for of_part in counts]))
                found[head].append(
                    self._estimate(structure, self.rms[head], errors[n], shares[head], own)
                )
            enough = self.request.enough_error
            reach = (structures[-1].tau / structure.tau) ** FALL if structure.tau else 1.0
            left = [
                head
                for head in left
                if enough < found[head][-1].row_error_estimate <= ALMOST * enough / reach
            ]
        return found

    def _counts(self, tau: float, group: int) -> list[int]:
        most = max(FEW_LANDMARKS, math.ceil(self.request.most_share * self.mask.len_kv))
        return self.prober[group].landmark_counts([tau] * len(self.prober.heads), most)

    def _errors(self, tau: float, heads: list[int]) -> list[torch.Tensor]:
        """Row errors of some heads over all parts; each part is asked once."""
        errors: list[list[torch.Tensor]] = [[] for _ in heads]
        for part in self.parts:
            missing = [head for head in heads if (tau, head) not in part.errors]
            if missing:
                needed = self._counts(tau, part.group)
                every = len(missing) == len(self.prober.heads)
                chosen = None if every else torch.tensor(missing, device=part.rows.device)
                norms = self._part_errors(part, [needed[head] for head in missing], chosen)
                part.errors.update(
                    {(tau, head): x for head, x in zip(missing, norms, strict=True)}
                )
            for n, head in enumerate(heads):
                errors[n].append(part.errors[tau, head])
        return [torch.cat(x) for x in errors]

    def _part_errors(
        self, part: Part, own: list[int], heads: torch.Tensor | None
    ) -> torch.Tensor:
        """Error norms (heads, rows) of a part's rows under near field + landmarks + pools."""

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x if heads is None else x[heads]

        prober = self.prober
        far = far_field(prober, part.group, own, heads)
        rows, sums, total = pick(part.rows), pick(part.near), pick(part.near_total)
        at = torch.arange(len(own), device=rows.device)
        at = (at if heads is None else heads)[:, None, None]
        if far.landmarks.shape[2]:
            marks, spare = far.landmarks, far.spare
            index = marks[:, :, None].expand(-1, -1, rows.shape[2], -1)
            found = pick(part.beyond).gather(3, index)
            if spare is not None:
                found = found.masked_fill(spare[:, :, None], 0)
            sums = sums + found @ prober.value[at, marks]
            total = total + found.sum(dim=3)
        if far.pool_bias.shape[2]:
            scores = pick(part.query) @ far.pool_key.transpose(2, 3)
            scores += far.pool_bias[:, :, None] - pick(part.lse)[..., None]
            seen = far_pools(prober, rows, far.pool_bias.shape[2]) & (scores > HIDDEN / 2)
            pooled = torch.where(seen, scores.clamp(max=20.0).exp(), 0.0)
            sums = sums + pooled @ far.pool_value
            total = total + pooled.sum(dim=3)
        approximate = sums / total.clamp_min(1e-30)[..., None]
        missed = (approximate - pick(part.exact)).double()
        return torch.linalg.vector_norm(missed, dim=3).flatten(1)

    def _shares(self, counts: list[list[int]]) -> list[float]:
        """Shares of the visible scores that near field, landmarks and pools come to."""
        geometry, mask = self.prober.geometry, self.mask
        start, stop = (edge[: geometry.tail.start] for edge in geometry.near)
        near = np.clip(np.minimum(stop, mask.stop[: geometry.tail.start]) - start, 0, None)
        tail = geometry.tail
        fixed = float(near.sum()) + float((mask.stop[tail] - mask.start[tail]).sum())
        if geometry.structure.pool:
            fixed += float((start // geometry.structure.pool).sum())
        reach = [geometry.far_keys(self.prober.groups[p.group]) for p in self.parts]
        shares = []
        for head in counts:
            # Groups that were not probed are taken to need as large a share of their keys.
            rate = sum(head) / max(sum(reach), 1)
            far = sum(
                rate * geometry.far_keys(g) * (g.stop - g.start) for g in self.prober.groups
            )
            shares.append(min((fixed + far) / max(mask.visible, 1), 1.0))
        return shares

    def _estimate(
        self,
        structure: Landmark,
        rms: float,
        errors: torch.Tensor,
        share: float,
        landmarks: float,
    ) -> StructureEstimate:
        found = errors.cpu().numpy()
        quantile = float(np.quantile(found, self.request.rows))
        frobenius = float(np.sqrt(np.mean(found**2)))
        pools = 0
        if structure.pool:
            pools = -(-self.prober.geometry.len_kv // structure.pool) // 2
        return StructureEstimate(
            structure=structure,
            share=share,
            rank=round(landmarks) + pools,
            row_error_estimate=relative(quantile, rms),
            frobenius_estimate=relative(frobenius, rms),
        )

    def _curves(self) -> list[dict[float, float]]:
        """Unrepresented mass -> mean share of the far keys needed as landmarks, by head."""
        out: list[dict[float, float]] = [{} for _ in self.prober.heads]
        probes = [self.prober[part.group] for part in self.parts]
        for tau in CURVE:
            taus = [tau] * len(out)
            shares = [
                np.array(p.landmark_counts(taus, FEW_LANDMARKS)) / max(p.mass.shape[2], 1)
                for p in probes
            ]
            for curve, share in zip(out, np.mean(shares, axis=0), strict=True):
                curve[tau] = float(share)
        return out


def relative(error: float, size: float) -> float:
    """Return error / size: 0/0 is 0, what is not a number is inf."""
    if error == 0:
        return 0.0
    found = error / size if size > 0 else math.inf
    return found if found == found else math.inf
