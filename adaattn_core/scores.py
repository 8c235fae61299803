"""Score rules: what some models do to scores besides scaling them, and who can run it.

``softcap`` (Gemma-2): scores become ``softcap * tanh(scale * q.k / softcap)``, before any mask
or bias. ``sinks`` (gpt-oss): one more logit per query head in every row's denominator, not
scaled, with no key and no value; the lse counts it, and is the sink where a row sees nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaattn_core.arrays import array_device, dtype_name, require_array
from adaattn_core.checks import real
from adaattn_core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from adaattn_core.backend import Capabilities

SOFTCAP, SINKS = "softcap", "sinks"
"""Names of the rules, as `Capabilities.rules` spells them."""


def checked_softcap(softcap: float | None) -> float | None:
    """Return the cap as a float, or None for none.

    Raises
    ------
    ArgumentError
        If it is not a positive finite number.
    """
    if softcap is None:
        return None
    cap = real("softcap", softcap, do="leave softcap out for none")
    if not (math.isfinite(cap) and cap > 0):
        raise ArgumentError(
            got=f"softcap={cap}",
            needed="a positive finite number",
            do="leave softcap out for none",
        )
    return cap


def check_sinks(sinks: Any, heads_q: int, device: str) -> None:
    """Check the array of sinks; None is none.

    Raises
    ------
    ShapeError
        If it is not of shape (heads_q,), or lives on another device than the queries.
    DTypeError
        If it does not hold floating point numbers.
    """
    if sinks is None:
        return
    require_array("sinks", sinks)
    if tuple(sinks.shape) != (heads_q,):
        raise ShapeError(
            got=f"sinks of shape {tuple(sinks.shape)}",
            needed=f"shape ({heads_q},): one logit per query head",
            do="pass the layer's own sinks, e.g. sinks.reshape(-1)",
        )
    if dtype_name(sinks) not in ("f64", "f32", "f16", "bf16"):
        raise DTypeError(
            got=f"sinks of dtype {dtype_name(sinks)}",
            needed="one of f64, f32, f16, bf16",
            do="cast them to float32",
        )
    if array_device(sinks) != device:
        raise ShapeError(
            got=f"sinks on {array_device(sinks)}, arrays on {device}",
            needed="all arrays on one device",
            do="move them first: nothing is copied between devices silently",
        )


def rules_of(problem: Any) -> tuple[str, ...]:
    """Names of the rules that a problem has."""
    asked = ((SOFTCAP, problem.softcap), (SINKS, problem.sinks))
    return tuple(name for name, value in asked if value is not None)


def under_rules(problem: Any, capabilities: Capabilities, backend: str) -> Capabilities:
    """Narrow what a backend can do to what it can do under a problem's rules.

    Raises
    ------
    UnsupportedError
        If it does not know a rule.
    """
    known = dict(capabilities.rules)
    for rule in rules_of(problem):
        if rule not in known:
            raise UnsupportedError(
                got=f'{rule} on backend "{backend}"',
                needed=f"a backend whose capabilities name the rule; this one: {sorted(known)}",
                do='use backend="numpy", or leave it out',
            )
        kinds = tuple(kind for kind in capabilities.structures if kind in known[rule])
        sizes = tuple(sized for sized in capabilities.sizes if sized.kind in kinds)
        capabilities = replace(capabilities, structures=kinds, sizes=sizes)
    formats = capabilities.rule_formats
    if formats is not None and rules_of(problem):
        capabilities = replace(
            capabilities,
            qk_formats=tuple(name for name in capabilities.qk_formats if name in formats),
            pv_formats=tuple(name for name in capabilities.pv_formats if name in formats),
        )
    return capabilities


def left_out(problem: Any, capabilities: Capabilities) -> str:
    """Say which structures and formats the rules of a problem leave out, if any."""
    known = dict(capabilities.rules)
    lost = {
        rule: [kind for kind in capabilities.structures if kind not in known.get(rule, ())]
        for rule in rules_of(problem)
    }
    if capabilities.rule_formats is not None:
        both = {*capabilities.qk_formats, *capabilities.pv_formats}
        without = sorted(both - set(capabilities.rule_formats))
        lost = {rule: [*kinds, *without] for rule, kinds in lost.items()}
    return "; ".join(f"{rule}: no {', '.join(kinds)}" for rule, kinds in lost.items() if kinds)
