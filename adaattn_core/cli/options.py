"""Options that commands share, turned into what the API takes."""

from __future__ import annotations

from typing import Any

from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.mask import Mask


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
        raise ArgumentError(
            got=f"--budget {text}",
            needed="a positive number, or the word exact",
            do="e.g. --budget 0.1: rows may err by a tenth of the root-mean-square output row",
        ) from None
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
