"""Plan: what was chosen for every head, and why; printable, hashable, saved as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from adaattn_core.errors import AdaAttnError, PlanError
from adaattn_core.files import atomic_write_text
from adaattn_core.formats import get_format
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.structure import Dense, Structure, structure_from_json

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
    scales : {"token", "block"}
        Granularity of the scales of 8-bit Q and K: per vector, or per 64 queries / 128 keys.
    smooth_k : bool
        Whether the mean key is subtracted before quantising (exact for softmax).
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
    scales: str = "token"
    smooth_k: bool = True
    rounding: str = "nearest"
    p_scale: float = 448.0
    flush_keys: int = 128
    reason: str = ""
    cost_estimate: float = 1.0
    error_estimate: float = 0.0

    def __post_init__(self) -> None:
        get_format(self.qk)
        get_format(self.pv)
        if self.scales not in ("token", "block") or self.rounding not in (
            "nearest",
            "stochastic",
        ):
            raise PlanError(
                got=f"scales={self.scales!r}, rounding={self.rounding!r}",
                needed='scales "token" or "block", rounding "nearest" or "stochastic"',
                do="correct the plan",
            )
        if not 0 < self.p_scale < math.inf or self.flush_keys < 0:
            raise PlanError(
                got=f"p_scale={self.p_scale}, flush_keys={self.flush_keys}",
                needed="a positive finite factor, and a number of keys of at least 0",
                do="correct the plan",
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        body = {name: getattr(self, name) for name in _HEAD_FIELDS}
        return {"structure": self.structure.to_json()} | body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> HeadPlan:
        """Invert `to_json`."""
        fields = dict(body)
        structure = structure_from_json(fields.pop("structure", {}))
        unknown = set(fields) - set(_HEAD_FIELDS)
        if unknown:
            raise PlanError(
                got=f"unknown plan fields {sorted(unknown)}",
                needed=f"fields {list(_HEAD_FIELDS)}",
                do="save the plan again with this version",
            )
        for name, value in fields.items():
            kind = _HEAD_FIELDS[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise PlanError(
                    got=f"{name}={value!r}",
                    needed=f"a {name} that is a {kind.__name__.lower()}",
                    do="save the plan again with this version",
                )
        return cls(structure=structure, **fields)


_HEAD_FIELDS: dict[str, type] = {
    "qk": str,
    "pv": str,
    "scales": str,
    "smooth_k": bool,
    "rounding": str,
    "p_scale": Real,
    "flush_keys": int,
    "reason": str,
    "cost_estimate": Real,
    "error_estimate": Real,
}


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
        if version not in (1, PLAN_VERSION):
            raise PlanError(
                got=f"a document with adaattn_plan={version!r}",
                needed=f"a plan of version {PLAN_VERSION}",
                do="save the plan again with this version of AdaAttn",
            )
        try:
            heads = {}
            for entry in body["heads"]:
                fields = dict(entry)
                if version == 1 and _is_score_skip(fields.get("structure")):
                    raise PlanError(
                        got="a plan of version 1 with score_skip (lam against the maximum)",
                        needed=f"version {PLAN_VERSION} (lam against the log-sum-exp)",
                        do="plan afresh and save again; at the same lam more is skipped now",
                    )
                index = (int(fields.pop("sequence")), int(fields.pop("head")))
                heads[index] = HeadPlan.from_json(fields)
            return cls(heads, int(body["seed"]), body["policy"], body["target"], body["layer"])
        except PlanError:
            raise
        except AdaAttnError as error:
            raise PlanError(
                got=error.got, needed=error.needed, do="save the plan again"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                got=f"a damaged plan ({type(error).__name__}: {error})",
                needed="every field that Plan.save writes",
                do="save the plan again",
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        atomic_write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        PlanError
            If the file cannot be read as a plan.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(
                got=f"{path}: {error}",
                needed="a plan file written by Plan.save or --save-plan",
                do="check the path, or plan afresh",
                path=str(path),
            ) from error
        return cls.from_json(body)
