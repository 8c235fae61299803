"""Colours, and how a figure is written: as small PNG files, on white."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_rgb
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FOLDER = Path(__file__).parent
COLOURS = 128
SOURCE = "source-sha256"
"""Name of the note in a picture that holds its source's digest."""

# Distinct for readers who see red and green alike (after Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b5394", "#f2a93b", "#009e73", "#8e44ad", "#8a8a8a"
PALE_BLUE, WHITE, HIDDEN = "#c6dbef", "#ffffff", "#e4e4e4"

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
)


def rgb(colour: str) -> tuple[float, float, float]:
    """A colour as three numbers in [0, 1]."""
    return to_rgb(colour)


def digest(source: Path) -> str:
    """What a figure says of the file that it was drawn from."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def save(figure: Any, name: str, dpi: int = 150, source: Path | None = None) -> Path:
    """Write a figure with a palette of few colours, which keeps the file small.

    Parameters
    ----------
    source : Path, optional
        File of figures that was drawn; its digest is kept in the picture, so that a test sees
        when one was changed without the other.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    notes = PngInfo()
    if source is not None:
        notes.add_text(SOURCE, digest(source))
    return save_image(Image.open(buffer), name, notes)


def save_image(image: Image.Image, name: str, notes: PngInfo | None = None) -> Path:
    """Write a picture with a palette of few colours."""
    path = FOLDER / f"{name}.png"
    small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True, pnginfo=notes)
    return path
