"""Plan: what was chosen for every head, and why; printable, hashable, saved as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adaattn_core.checks import real, shown, truth, unique_names, whole, word
from adaattn_core.errors import ArgumentError, PlanError
from adaattn_core.files import as_path, atomic_write_text, reading
from adaattn_core.formats import SCALE_BLOCKS, get_format
from adaattn_core.lazy import LazyHeads
from adaattn_core.problem import AttentionProblem, HeadIndex, SequenceSpan
from adaattn_core.structure import BlockSparse, Dense, Structure, structure_from_json

SEED_MAX = 2**63 - 1
PLAN_VERSION = 2
"""Version of the saved form; a file of another version is refused, never guessed at.

Version 1 differs in one thing: `ScoreSkip.lam` was compared with a row's running maximum, not
its running log-sum-exp. Plans of version 1 without such a head mean the same and are read.
"""


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How one head is computed.

    Attributes
    ----------
    structure : Structure
    qk, pv : str
        Formats of the operands of Q·Kᵀ and of P·V.
    scales : {"tile", "token", "block"}
        Granularity of the scales of 8-bit operands (`adaattn_core.formats.SCALE_BLOCKS`): one
        per query, 16 keys and 256 values; per vector, and channel of V; or per 64 queries, 128
        keys, and channel of V.
    smooth_k : bool
        Whether about the mean key is subtracted before quantising (exact for softmax).
    rounding : {"nearest", "stochastic"}
        How 8-bit operands of Q·Kᵀ are rounded.
    p_scale : float
        Factor on P in [0, 1] before rounding to an 8-bit format.
    flush_keys : int
        Keys after which e4m3 P·V partial sums are added to float32 accumulators; 0: after the
        last one.
    reason : str
        Which term of the budget, or which rule, decided.
    cost_estimate : float
        Predicted cost relative to dense f32 on the plan's target.
    error_estimate : float
        Predicted row error at the budget's quantile.
    """

    structure: Structure = field(default_factory=Dense)
    qk: str = "f32"
    pv: str = "f32"
    scales: str = "tile"
    smooth_k: bool = True
    rounding: str = "nearest"
    p_scale: float = 448.0
    flush_keys: int = 256
    reason: str = ""
    cost_estimate: float = 1.0
    error_estimate: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.structure, Structure):
            raise PlanError(
                got=f"structure={shown(self.structure)}",
                needed="a Structure, e.g. Dense() or Landmark()",
                do="see adaattn_core.structure for the kinds",
            )
        for name, check in _HEAD_FIELDS.items():
            given = getattr(self, name)
            checked = check(name, given)
            if checked is not given:
                object.__setattr__(self, name, checked)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        body = {name: getattr(self, name) for name in _HEAD_FIELDS}
        return {"structure": self.structure.to_json()} | body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> HeadPlan:
        """Invert `to_json`.

        Raises
        ------
        PlanError
            If a field is missing or unknown, or a value has another type or range.
        """
        fields = dict(body)
        _require_fields(fields, ("structure", *_HEAD_FIELDS), "a head's plan")
        structure = structure_from_json(fields.pop("structure"))
        try:
            return cls(structure=structure, **fields)
        except ArgumentError as error:  # a format that is none
            raise PlanError(got=error.got, needed=error.needed, do=error.do) from error


_WEIGHT_FACTOR = 2.0**40
"""Largest factor on P, and the inverse of the smallest: products with it stay in range."""


def _format_name(name: str, value: Any) -> str:
    return get_format(word(name, value, error=PlanError)).name


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    return lambda name, value: real(name, value, least, most, error=PlanError)


_HEAD_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "qk": _format_name,
    "pv": _format_name,
    "scales": partial(word, options=tuple(SCALE_BLOCKS), error=PlanError),
    "smooth_k": partial(truth, error=PlanError),
    "rounding": partial(word, options=("nearest", "stochastic"), error=PlanError),
    "p_scale": _number(1 / _WEIGHT_FACTOR, _WEIGHT_FACTOR),
    "flush_keys": partial(whole, error=PlanError),
    "reason": partial(word, error=PlanError),
    "cost_estimate": _number(0.0, math.inf),
    "error_estimate": _number(0.0, math.inf),
}
"""Fields of a head's plan besides its structure, and what checks them."""


def _require_fields(fields: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    if set(fields) != set(names):
        odd = sorted(map(str, set(fields) ^ set(names)))
        raise PlanError(
            got=f"{what} in which fields are missing or unknown: {shown(odd)}",
            needed=f"fields {list(names)}",
            do="save the plan again with this version",
        )


def block_lengths(problem: AttentionProblem, span: SequenceSpan) -> tuple[int, int]:
    """Rows and keys that a sequence's block mask speaks of, padding included."""
    padded = problem.mask.cu_seqlens_kv is None
    return span.len_q, problem.len_kv if padded else span.len_kv


def _are_heads(heads: Any) -> bool:
    return isinstance(heads, Mapping) and all(
        type(index) is tuple
        and len(index) == 2
        and type(index[0]) is int
        and type(index[1]) is int
        and index[0] >= 0
        and index[1] >= 0
        and isinstance(head, HeadPlan)
        for index, head in heads.items()
    )


def _is_score_skip(structure: Any) -> bool:
    return isinstance(structure, Mapping) and structure.get("kind") == "score_skip"


@dataclass(frozen=True, slots=True)
class Plan:
    """A head plan for every (sequence, head).

    Attributes
    ----------
    heads : mapping of (sequence, head) to HeadPlan
    seed : int
        Seed of every random choice that the run makes (probe rows, stochastic rounding);
        running the same plan again reproduces the output bit for bit on the same backend.
    policy : str
        Name of the policy that decided.
    target : str
        Machine that the costs were predicted for.
    layer : str
        Name of the model's layer, or "".
    """

    heads: Mapping[HeadIndex, HeadPlan]
    seed: int = 0
    policy: str = ""
    target: str = ""
    layer: str = ""

    def __post_init__(self) -> None:
        # Heads of a device are not waited for.
        if not isinstance(self.heads, LazyHeads) and not _are_heads(self.heads):
            raise PlanError(
                got=f"heads={shown(self.heads)}",
                needed="a mapping of (sequence, head), two ints of at least 0, to HeadPlan",
                do="make the plan with Plan.uniform, or one HeadPlan per head",
            )
        whole("seed", self.seed, 0, SEED_MAX, error=PlanError)
        for name in ("policy", "target", "layer"):
            word(name, getattr(self, name), error=PlanError)

    def __getitem__(self, index: HeadIndex) -> HeadPlan:
        return self.heads[index]

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self.heads)

    def __hash__(self) -> int:
        return hash((frozenset(self.heads.items()), self.seed))

    @classmethod
    def uniform(cls, problem: AttentionProblem, head: HeadPlan, **facts: Any) -> Plan:
        """Return the same head plan for every head of a problem."""
        return cls(heads=dict.fromkeys(problem.heads(), head), **facts)

    @classmethod
    def block_sparse(
        cls,
        problem: AttentionProblem,
        blocks: Any,
        *,
        tile_q: int = 128,
        tile_kv: int = 64,
        head: HeadPlan | None = None,
    ) -> Plan:
        """Return a plan that keeps the key blocks of a boolean array.

        Parameters
        ----------
        problem : AttentionProblem
        blocks : array_like of bool, shape (sequences, heads_q, query tiles, key blocks)
            True = kept. Leading axes may be left out, or of size 1 where all share a pattern.
            Tiles and blocks cover the longest sequence; of shorter ones the first count.
        tile_q, tile_kv : int
            Queries per tile and keys per block.
        head : HeadPlan, optional
            Formats of all heads; default those of `HeadPlan`.

        Raises
        ------
        PlanError
            If the array's shape does not fit the problem.
        ArgumentError
            If it is not boolean, or a size is not a positive whole number.
        """
        tile_q, tile_kv = whole("tile_q", tile_q, 1), whole("tile_kv", tile_kv, 1)
        sizes = [
            (-(-len_q // tile_q), -(-len_kv // tile_kv))
            for len_q, len_kv in (block_lengths(problem, span) for span in problem.sequences)
        ]
        longest = max((t for t, _ in sizes), default=0), max((b for _, b in sizes), default=0)
        array = np.asarray(blocks)
        lead = (1,) * (4 - array.ndim) + array.shape[:-2]
        needed = (len(problem.sequences), problem.heads_q)
        fits = 2 <= array.ndim <= 4 and array.shape[-2:] == longest
        if not fits or any(n not in (1, m) for n, m in zip(lead, needed, strict=True)):
            raise PlanError(
                got=f"blocks of shape {array.shape}",
                needed=f"{(*needed, *longest)} (sequences, heads, query tiles, key blocks),"
                " or fewer axes",
                do="count query tiles and key blocks of the longest sequence",
            )
        array = array.reshape(*lead, *longest)
        head = head or HeadPlan(reason="blocks given by the caller")
        made: dict[tuple[int, ...], HeadPlan] = {}
        heads = {}
        for sequence, number in problem.heads():
            place, size = (
                (min(sequence, lead[0] - 1), min(number, lead[1] - 1)),
                sizes[sequence],
            )
            if (*place, *size) not in made:
                kept = array[place][: size[0], : size[1]]
                structure = BlockSparse.from_mask(kept, tile_q=tile_q, tile_kv=tile_kv)
                made[*place, *size] = replace(head, structure=structure)
            heads[sequence, number] = made[*place, *size]
        return cls(heads, policy="blocks")

    def with_heads(self, changed: Mapping[HeadIndex, HeadPlan]) -> Plan:
        """Return a plan in which some heads are replaced."""
        return replace(self, heads={**self.heads, **changed})

    def check_fits(self, problem: AttentionProblem) -> None:
        """Raise PlanError unless the plan speaks of exactly the problem's heads."""
        expected = set(problem.heads())
        if set(self.heads) != expected:
            raise PlanError(
                got=f"a plan for {len(self.heads)} (sequence, head) pairs",
                needed=f"one for {len(problem.sequences)} sequences x {problem.heads_q} heads",
                do="plan this problem afresh, or save one plan per shape",
            )
        for (sequence, _), head in self.heads.items():
            if isinstance(head.structure, BlockSparse) and head.structure.blocks is not None:
                lengths = block_lengths(problem, problem.sequences[sequence])
                head.structure.check_fits(*lengths)

    def explain(self) -> str:
        """Return a table: which heads run how, and what bound the choice."""
        lines = [
            f"plan by {self.policy or 'hand'} for {self.target or 'any machine'}"
            + (f", layer {self.layer}" if self.layer else ""),
            f"{'seq':>3} {'head':>4}  {'structure':<12} {'qk':<5} {'pv':<5}"
            f" {'cost':>6} {'error':>8}  reason",
        ]
        for (sequence, head), p in self.heads.items():
            lines.append(
                f"{sequence:>3} {head:>4}  {p.structure.kind:<12} {p.qk:<5} {p.pv:<5}"
                f" {p.cost_estimate:>6.2f} {p.error_estimate:>8.4f}  {p.reason}"
            )
        counts = Counter((p.structure.kind, p.qk, p.pv) for p in self.heads.values())
        lines.append(
            "in all: "
            + ", ".join(f"{n} x {s} {q}/{v}" for (s, q, v), n in counts.most_common())
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {
            "adaattn_plan": PLAN_VERSION,
            "seed": self.seed,
            "policy": self.policy,
            "target": self.target,
            "layer": self.layer,
            "heads": [
                {"sequence": s, "head": h} | p.to_json() for (s, h), p in self.heads.items()
            ],
        }

    @classmethod
    def from_json(cls, body: Any) -> Plan:
        """Invert `to_json`.

        Raises
        ------
        PlanError
            If the document is not a plan of this version, or of an older one that means the
            same.
        """
        version = body.get("adaattn_plan") if isinstance(body, dict) else None
        if type(version) is not int or version not in (1, PLAN_VERSION):
            raise PlanError(
                got=f"a document with adaattn_plan={shown(version)}",
                needed=f"a plan of version {PLAN_VERSION}",
                do="save the plan again with this version of AdaAttn",
            )
        fields = dict(body)
        names = ("adaattn_plan", "seed", "policy", "target", "layer", "heads")
        _require_fields(fields, names, "a plan")
        entries = fields["heads"]
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise PlanError(
                got=f"heads={shown(entries)}",
                needed="a list with one object for each head",
                do="save the plan again",
            )
        heads: dict[HeadIndex, HeadPlan] = {}
        for entry in entries:
            head = dict(entry)
            if version == 1 and _is_score_skip(head.get("structure")):
                raise PlanError(
                    got="a plan of version 1 with score_skip (lam against the maximum)",
                    needed=f"version {PLAN_VERSION} (lam against the log-sum-exp)",
                    do="plan afresh and save again; at the same lam more is skipped now",
                )
            index = tuple(
                whole(name, head.pop(name, None), error=PlanError)
                for name in ("sequence", "head")
            )
            if index in heads:
                raise PlanError(
                    got=f"two plans for sequence {index[0]}, head {index[1]}",
                    needed="one plan for each head",
                    do="save the plan again",
                )
            heads[index[0], index[1]] = HeadPlan.from_json(head)
        return cls(heads, fields["seed"], fields["policy"], fields["target"], fields["layer"])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        atomic_write_text(as_path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        PlanError
            If the file cannot be read as a plan.
        """
        path = as_path(path)
        with reading(
            path,
            needed="a plan file written by Plan.save or --save-plan",
            do="check the path, or plan afresh",
            error=PlanError,
        ):
            text = path.read_text(encoding="utf-8")
            return cls.from_json(json.loads(text, object_pairs_hook=unique_names))
