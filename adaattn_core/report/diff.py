"""Two runs side by side: which heads were decided otherwise, and what that changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaattn_core.errors import FileError
from adaattn_core.files import reading
from adaattn_core.report.charts import Guide, Series, xy_chart
from adaattn_core.report.heads import Head, key_of, name_of, upper_of
from adaattn_core.report.page import Column, Figure, Row, Section, page_data, table
from adaattn_core.report.svg import Axis, Mark, short, text_of

_KINDS: dict[str, type | tuple[type, ...]] = {
    "layer": str,
    "batch": int,
    "head": int,
    "structure": str,
    "qk": str,
    "pv": str,
    "share": (int, float),
    "certificate": dict,
}
"""What a comparison reads of a head, and what it must be there."""


def read_run(path: Path) -> dict[str, Any]:
    """Read the JSON document of a run, or a page that was made of one.

    Raises
    ------
    FileError
        If the file is neither.
    """
    do = "make it with `adaattn run ... --json > run.json`, or --report run.html"
    with reading(path, needed="the JSON or the page of an earlier run", do=do):
        text = path.read_text("utf-8")
        body = page_data(text) if text.lstrip().startswith("<!DOCTYPE") else json.loads(text)
    heads = body.get("heads") if isinstance(body, dict) else None
    settings = body.get("settings", {}) if isinstance(body, dict) else {}
    usable = isinstance(heads, list) and isinstance(settings, dict)
    if not usable or not all(map(_is_head, heads or ())):
        raise FileError(
            got=f"{path}: JSON without the heads of a run",
            needed="the JSON or the page of an earlier run",
            do=do,
            path=str(path),
        )
    return dict(body)


def _is_head(head: Any) -> bool:
    return (
        isinstance(head, dict)
        and all(isinstance(head.get(name), kind) for name, kind in _KINDS.items())
        and isinstance(head["certificate"].get("upper", ""), int | float | None)
    )


def diff_section(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Section:
    """Compare two runs head by head; heads that only one of them has are counted."""
    old, new = _matched(before["heads"], after["heads"])
    common = [key for key in new if key in old]
    changed = [key for key in common if _decision(old[key]) != _decision(new[key])]
    moved = sum(
        math.isfinite(upper_of(new[k])) and upper_of(new[k]) > upper_of(old[k]) for k in common
    )
    lead = (
        f"Before: {text_of(name)}. {len(changed)} of {len(common)} heads are computed in"
        f" another way now; {moved} certificates are larger."
    )
    if len(common) < max(len(old), len(new)):
        lead += f" {len(old) - len(common)} heads are only in the former run,"
        lead += f" {len(new) - len(common)} only in this one."
    settings = _settings(before.get("settings", {}), after.get("settings", {}))
    figures = []
    if common:
        figures = [
            _figure(old, new, common, lambda h: h["share"], "share of scores computed"),
            _figure(old, new, common, upper_of, "certified error"),
        ]
    return Section("Against an earlier run", lead, figures, settings + _table(old, new, common))


def _matched(
    before: Sequence[Head], after: Sequence[Head]
) -> tuple[dict[str, Head], dict[str, Head]]:
    """Heads by name; runs of one layer each are matched whatever the layer is called."""
    layers = ({h["layer"] for h in before}, {h["layer"] for h in after})
    if all(len(found) == 1 for found in layers):
        (layer,) = layers[1]
        before = [{**head, "layer": layer} for head in before]
    return {key_of(h): h for h in before}, {key_of(h): h for h in after}


def _decision(head: Head) -> tuple[Any, ...]:
    return (head["structure"], head["qk"], head["pv"], head.get("parameters"))


def _decision_text(head: Head) -> str:
    return f"{head['structure']} {head['qk']}/{head['pv']}"


def _figure(
    old: Mapping[str, Head],
    new: Mapping[str, Head],
    keys: Sequence[str],
    value: Callable[[Head], float],
    what: str,
) -> Figure:
    """Before against after: what did not change lies on the diagonal."""
    marks: dict[bool, list[Mark]] = {True: [], False: []}
    for key in keys:
        a, b = old[key], new[key]
        mark = Mark(value(a), value(b), _tip(a, b, value, what), key)
        marks[_decision(a) != _decision(b)].append(mark)
    series = [
        Series("decided alike", marks[False], joined=False, style=6),
        Series("decided otherwise", marks[True], joined=False, style=1),
    ]
    found = [x for m in (*marks[True], *marks[False]) for x in (m.x, m.y)]
    high = max((x for x in found if x is not None and math.isfinite(x)), default=1.0) * 1.04
    svg = xy_chart(
        f"{what} of every head, before and after", series,
        Axis(f"{what}, before", low=0.0, high=high), Axis("after", low=0.0, high=high),
        guides=[Guide("unchanged", diagonal=True)],
    )  # fmt: skip
    return Figure(svg, f"{what.capitalize()} of every head in both runs; below the line: less.")


def _tip(old: Head, new: Head, value: Callable[[Head], float], what: str) -> str:
    return (
        f"{name_of(new)}\n{what}: {short(value(old))}, now {short(value(new))}\n"
        f"{_decision_text(old)}, now {_decision_text(new)}"
    )


def _settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    if not names:
        return "<p>Both were asked the same.</p>"
    rows = [
        Row([text_of(x) for x in (n, before.get(n, "-"), after.get(n, "-"))]) for n in names
    ]
    columns = [Column(n, text=True) for n in ("asked", "before", "after")]
    return table("asked-before", columns, rows)


def _table(old: Mapping[str, Head], new: Mapping[str, Head], keys: Sequence[str]) -> str:
    columns = [
        Column("head", text=True), Column("before", text=True), Column("after", text=True),
        Column("share before"), Column("share after"), Column("upper before"),
        Column("upper after"), Column("decided otherwise", text=True),
    ]  # fmt: skip
    rows = []
    for key in keys:
        a, b = old[key], new[key]
        other = "<b>yes</b>" if _decision(a) != _decision(b) else "no"
        cells = [text_of(x) for x in (name_of(b), _decision_text(a), _decision_text(b))]
        cells += [short(x) for x in (a["share"], b["share"], upper_of(a), upper_of(b))]
        rows.append(Row([*cells, other], key))
    return table("diff", columns, rows)
