"""The page about a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaattn_core.report.diff import diff_section
from adaattn_core.report.heads import (
    Head,
    certificate_figure,
    heads_table,
    held_of,
    map_figure,
    share_figure,
)
from adaattn_core.report.page import Page, Section, Tile, facts_table
from adaattn_core.report.predict import prediction_lines
from adaattn_core.report.svg import short

EXPLANATION = (
    "With the stated confidence, at least the stated share of a head's query rows err by at"
    " most <em>certified upper</em> times the head's root-mean-square output row. The estimate"
    " and the Frobenius error are relative to the head's whole output; <em>true rows</em> is"
    " the row quantile that the certificate speaks about. A heading sorts, a word filters."
)


def render_report(
    title: str,
    body: Mapping[str, Any],
    *,
    budget: float | None = None,
    before: tuple[str, Mapping[str, Any]] | None = None,
) -> str:
    """Return the page as text.

    Parameters
    ----------
    title : str
        Heading, for example the input's name.
    body : mapping
        The run's JSON document: ``heads``, ``totals``, ``settings``, ``provenance`` and,
        where one was made, ``prediction``.
    budget : float, optional
        For the line across the certificates.
    before : (str, mapping), optional
        Name and JSON document of an earlier run to compare with.
    """
    heads, totals = body["heads"], body["totals"]
    sections = [
        Section(
            "Heads",
            "Point at a mark, or walk there with Tab and the arrow keys: the same head lights"
            " up everywhere.",
            [map_figure(heads), certificate_figure(heads, budget), share_figure(heads)],
        )
    ]
    if before is not None:
        sections.append(diff_section(before[1], body, before[0]))
    sections += [
        Section("Every head", EXPLANATION, body=heads_table(heads)),
        Section("Asked", body=facts_table(body["settings"])),
        Section("Computed by", body=facts_table(body["provenance"])),
    ]
    return Page(
        title, _lines(body), _tiles(heads, totals), sections, {"kind": "run", **body}
    ).render()


def _tiles(heads: Sequence[Head], totals: Mapping[str, Any]) -> list[Tile]:
    tiles = [
        Tile(f"{totals['share']:.1%}", "of the visible scores computed"),
        Tile(f"{totals['seconds']:.2f} s", "the whole call"),
    ]
    if totals["dense_seconds"] is not None:
        ratio = totals["dense_seconds"] / totals["seconds"] if totals["seconds"] else 1.0
        tiles.append(Tile(f"{ratio:.2f}x", "as fast as exact, same backend"))
    held = [held_of(head) for head in heads]
    if None not in held:
        tiles.append(Tile(f"{sum(map(bool, held))} of {len(held)}", "certificates true"))
        tiles.append(Tile(short(totals["worst_measured"]), "worst true Frobenius error"))
    return tiles


def _lines(body: Mapping[str, Any]) -> list[str]:
    found = body.get("prediction")
    return [] if found is None else prediction_lines(found)
