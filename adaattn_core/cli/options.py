"""Options that commands share, turned into what the API takes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.mask import Mask
from adaattn_core.policies import CalibratedPolicy, FixedPolicy, Policy
from adaattn_core.structure import Structure, structure_from_json


def parse_budget(
    text: str,
    *,
    rows: float | None = None,
    confidence: float | None = None,
    guarantee: str | None = None,
    on_violation: str | None = None,
) -> ErrorBudget | None:
    """Turn ``--budget`` and its companions into a budget; ``"exact"`` gives None.

    Raises
    ------
    ArgumentError
        If a number or word is not admissible, or a companion is given beside ``exact``.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("rows", rows),
            ("confidence", confidence),
            ("guarantee", guarantee),
            ("on_violation", on_violation),
        )
        if value is not None
    }
    if text == "exact":
        if given:
            raise ArgumentError(
                got=f"--budget exact together with {', '.join(_flag(n) for n in given)}",
                needed="a number as budget where the budget is qualified",
                do="leave them out, or state a tolerance such as --budget 0.1",
            )
        return None
    try:
        rel = float(text)
    except ValueError:
        rel = math.nan
    if not 0 < rel < math.inf:
        raise ArgumentError(
            got=f"--budget {text}",
            needed="a positive number, or the word exact",
            do="e.g. --budget 0.1: rows may err by a tenth of the root-mean-square output row",
        )
    return ErrorBudget(rel, **given)


def parse_mask(causal: bool, alignment: str | None) -> Mask:
    """Turn ``--causal/--full`` and ``--alignment`` into a mask.

    Raises
    ------
    ArgumentError
        If an alignment is unknown, or given beside ``--full``.
    """
    if causal:
        # The words are checked by Mask.causal itself.
        return Mask.causal(alignment)  # type: ignore[arg-type]
    if alignment is not None:
        raise ArgumentError(
            got=f"--full together with --alignment {alignment}",
            needed="an alignment for causal masks only",
            do="leave --alignment out, or use --causal",
        )
    return Mask.none()


def parse_policy(
    name: str | None,
    *,
    structure: str | None,
    qk: str | None,
    pv: str | None,
    calibration: Path | None,
) -> Policy | str | None:
    """Turn ``--policy`` and the options of single policies into what `attention` takes.

    Raises
    ------
    ArgumentError
        If an option belongs to another policy, or ``calibrated`` comes without its plans.
    PlanError
        If the calibration cannot be read, or a structure has unknown fields.
    """
    owners = {"structure": "fixed", "qk": "fixed", "pv": "fixed", "calibration": "calibrated"}
    options = {"structure": structure, "qk": qk, "pv": pv, "calibration": calibration}
    for option, value in options.items():
        if value is not None and name != owners[option]:
            raise ArgumentError(
                got=f"{_flag(option)} together with --policy {name or 'budget (the default)'}",
                needed=f"--policy {owners[option]}, the one that reads it",
                do=f"add --policy {owners[option]}, or leave {_flag(option)} out",
            )
    if name == "fixed":
        formats = {"qk": qk or "f32", "pv": pv or "f32"}
        return FixedPolicy(structure=parse_structure(structure or "dense"), **formats)
    if name == "calibrated":
        if calibration is None:
            raise ArgumentError(
                got="--policy calibrated without its plans",
                needed="--calibration with a plan file, or a folder of <layer>.json files",
                do="make them with --save-plan",
            )
        return CalibratedPolicy(calibration)
    return name


def parse_structure(text: str) -> Structure:
    """Turn ``"landmark:tau=0.02,band=128"`` into a structure; other fields keep their defaults.

    Raises
    ------
    PlanError, ArgumentError
        If the kind or a field is unknown, or a value is not admissible.
    """
    kind, _, rest = text.partition(":")
    body: dict[str, Any] = {"kind": kind}
    for item in filter(None, rest.split(",")):
        field, _, value = item.partition("=")
        try:
            body[field] = json.loads(value)
        except ValueError:
            raise ArgumentError(
                got=f"--structure {text}: {item}",
                needed="field=number, or field=true",
                do="e.g. --structure landmark:tau=0.02,band=128",
            ) from None
    return structure_from_json(body, partial=True)


_AS_FLAGS = (
    (r"budget=None", "--budget exact"),
    (r"ErrorBudget\(rel=([\d.]+)\)", r"--budget \1"),
    (r"\brel=", "--budget "),
    (r"\bon_violation=", "--on-violation "),
    (
        r"\b(rows|confidence|guarantee|policy|backend|target|alignment|scale|seed|qk|pv)="
        r"(?=[\"'\w.+-])",
        r"--\1 ",
    ),
    (r"(--[a-z-]+) ([\"'])([\w.+-]+)\2", r"\1 \3"),
    (r"\bpass layer=", "name the file after its layer"),
)


def in_flags(text: str) -> str:
    """Say of options what a message says of the arguments of `attention`."""
    for pattern, flags in _AS_FLAGS:
        text = re.sub(pattern, flags, text)
    return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
