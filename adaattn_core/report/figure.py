"""One figure: what was chosen for every head of every layer."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaattn_core.errors import FileError, UnsupportedError
from adaattn_core.files import atomic_write, check_writable, write_all
from adaattn_core.report.summary import HeadRow

SUFFIXES = (".png", ".pdf", ".svg")

_COLOURS = ("#77aadd", "#eedd88", "#44bb99", "#ffaabb", "#99ddff", "#ee8866", "#bbcc33")
"""Paul Tol's light scheme: legible under black text, and told apart by colour-blind readers."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_figure(path: Path) -> None:
    """Raise an error if `path` cannot become a figure; called before anything is computed.

    Raises
    ------
    FileError
        If the name has no known suffix or the folder cannot be written.
    UnsupportedError
        If matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise FileError(
            got=f"{path}: a figure of kind {path.suffix or 'without a suffix'}",
            needed=f"a name that ends in {', '.join(SUFFIXES)}",
            do="rename it",
            path=str(path),
        )
    check_writable(path)
    if not can_draw():
        raise UnsupportedError(
            got=f"a figure asked for at {path}",
            needed="matplotlib, which is not installed",
            do="pip install matplotlib, or leave the figure out (--no-figure)",
        )


def draw_choices(path: Path, rows: Sequence[HeadRow], title: str) -> None:
    """Write a heads x layers map: colour = structure and formats, number = share kept."""
    figure = _figure(rows, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=150)
    atomic_write(path, lambda stream: write_all(stream, buffer.getvalue()))


def _choice(row: HeadRow) -> str:
    return f"{row.plan.structure.kind} {row.plan.qk}/{row.plan.pv}"


def _figure(rows: Sequence[HeadRow], title: str) -> Any:
    # Imported here because matplotlib is optional and slow to import.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    colormap = importlib.import_module("matplotlib.colors").ListedColormap
    patch = importlib.import_module("matplotlib.patches").Patch

    layers = list(dict.fromkeys(row.layer for row in rows))
    heads = sorted({row.index[1] for row in rows})
    choices = list(dict.fromkeys(_choice(row) for row in rows))
    grid = np.full((len(layers), len(heads)), np.nan)
    for row in rows:
        grid[layers.index(row.layer), heads.index(row.index[1])] = choices.index(_choice(row))

    figure = figure_class(figsize=(1.6 + 1.1 * len(heads), 1.8 + 0.6 * len(layers)))
    axes = figure.add_subplot()
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(choices))]
    axes.imshow(grid, cmap=colormap(colours), vmin=-0.5, vmax=len(choices) - 0.5, aspect="auto")
    for row in rows:
        at = heads.index(row.index[1]), layers.index(row.layer)
        axes.text(*at, f"{row.share:.0%}", ha="center", va="center")
    axes.set_xticks(range(len(heads)), [str(head) for head in heads])
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    legend = [patch(color=c, label=name) for c, name in zip(colours, choices, strict=True)]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8)
    figure.set_layout_engine("constrained")
    return figure
