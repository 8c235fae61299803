"""Inline SVG without a library: scales, axes and marks to point at or to walk through.

Every mark bears its text (``data-tip``) and the name of what it stands for (``data-key``): the
page's script shows the text on hover and on focus, and marks the same thing in every figure and
table. Colours are told apart by colour-blind readers, and never say anything alone: a shape or
a letter says it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from adaattn_core.errors import printable

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a7a7a")
"""Okabe and Ito's scheme (jfly.uni-koeln.de/color), darkest first, with a grey."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down", "ring")
RAMP = ("#fff5dc", "#e6d57a", "#a9a875", "#6f7b76", "#3d5276", "#00214e")
"""From little to much, in falling lightness (after cividis): grey print keeps the order."""

_FONT = 12
"""Size of the figures' text in user units."""


def text_of(value: object) -> str:
    """Text of a file or plan, fit for HTML: markup escaped, control characters made visible."""
    lines = (printable(line) for line in str(value).split("\n"))
    return escape("\n".join(lines))


def short(value: float | None) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says.

    Attributes
    ----------
    label : str
    log : bool
    low, high : float, optional
        Ends; by default those of the data.
    names : mapping of position to text, optional
        Ticks; by default round numbers.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: tuple[tuple[float, str], ...] = ()

    def scaled(self, values: Iterable[float | None], start: float, stop: float) -> Scale:
        """Return the scale that shows finite `values` between two positions in user units."""
        found = [x for x in values if x is not None and math.isfinite(x)]
        found = [x for x in found if x > 0] if self.log else found
        low = self.low if self.low is not None else min(found, default=0.1 if self.log else 0)
        high = self.high if self.high is not None else max(found, default=1.0)
        if self.log:
            low, high = min(low, high) / 1.15, max(low, high) * 1.15
        else:
            room = 0.04 * (high - low or 1.0)
            low = low if self.low is not None else low - room
            high = high if self.high is not None else high + room
        return Scale(low, high if high > low else low + 1.0, start, stop, self.log)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers to positions; what lies outside is drawn at the end that it passed."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float | None) -> float:
        """Position of a number; NaN and None lie at the low end."""
        if value is None or math.isnan(value):
            return self.start
        x = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(x / self.low) / math.log(self.high / self.low)
        else:
            share = (x - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round numbers inside."""
        if self.log:
            powers = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [d * 10.0**p for p in powers for d in digits]
                found = [x for x in found if self.low <= x <= self.high]
                if len(found) >= 3:
                    return found[:: max(len(found) // 8, 1)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing to point at: where it lies, what it says, and which thing it stands for."""

    x: float | None
    y: float | None
    tip: str
    key: str = ""


def focusable(body: str, tip: str, key: str = "", *, row: int = 0, column: int = 0) -> str:
    """Wrap shapes as one mark; its first line is what a screen reader says."""
    spoken = text_of(tip.replace("\n", ", "))
    place = f' data-row="{row}" data-column="{column}"' if row or column else ""
    return (
        f'<g class="mark" tabindex="-1" role="img" aria-label="{spoken}"'
        f' data-tip="{text_of(tip)}" data-key="{text_of(key)}"{place}>{body}</g>'
    )


def shape(name: str, x: float, y: float, colour: str, size: float = 5.0) -> str:
    """One of `SHAPES` around a point."""
    s = size
    points = {
        "triangle": f"{x},{y - s} {x + s},{y + s} {x - s},{y + s}",
        "down": f"{x},{y + s} {x + s},{y - s} {x - s},{y - s}",
        "diamond": f"{x},{y - s * 1.2} {x + s * 1.2},{y} {x},{y + s * 1.2} {x - s * 1.2},{y}",
    }
    if name in points:
        return f'<polygon points="{points[name]}" fill="{colour}"/>'
    if name == "square":
        return (
            f'<rect x="{x - s:.1f}" y="{y - s:.1f}" width="{2 * s}" height="{2 * s}"'
            f' fill="{colour}"/>'
        )
    if name == "cross":
        path = f"M{x - s},{y - s}L{x + s},{y + s}M{x - s},{y + s}L{x + s},{y - s}"
        return f'<path d="{path}" stroke="{colour}" stroke-width="2.5" fill="none"/>'
    fill = f'fill="none" stroke="{colour}" stroke-width="2"' if name == "ring" else ""
    fill = fill or f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}" {fill}/>'


def label(x: float, y: float, content: str, anchor: str = "middle", extra: str = "") -> str:
    """Text at a point."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {extra}>{text_of(content)}</text>"


def drawing(width: float, height: float, name: str, body: Sequence[str]) -> str:
    """Return the whole figure; `name` is what it shows, in a sentence."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="group"'
        f' aria-label="{text_of(name)}. Arrow keys move between marks."'
        f' font-size="{_FONT}">{"".join(body)}</svg>'
    )


def frame(x: Scale, y: Scale, x_axis: Axis, y_axis: Axis) -> list[str]:
    """Grid, ticks and labels of a plot whose y grows upwards."""
    left, right, foot, head = x.start, x.stop, y.start, y.stop
    parts = [
        f'<rect class="frame" x="{left:.1f}" y="{head:.1f}" width="{right - left:.1f}"'
        f' height="{foot - head:.1f}"/>'
    ]
    for value, name in x_axis.names or [(t, short(t)) for t in x.ticks()]:
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f},{foot:.1f}V{head:.1f}"/>')
        parts.append(label(at, foot + 16, name))
    for value, name in y_axis.names or [(t, short(t)) for t in y.ticks()]:
        at = y(value)
        parts.append(f'<path class="grid" d="M{left:.1f},{at:.1f}H{right:.1f}"/>')
        parts.append(label(left - 6, at + 4, name, "end"))
    parts.append(label((left + right) / 2, foot + 36, x_axis.label))
    middle = (foot + head) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(label(14, middle, y_axis.label, "middle", turned))
    return parts


def ramp(share: float) -> str:
    """Colour of a share in [0, 1] on `RAMP`."""
    at = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    first = min(int(at), len(RAMP) - 2)
    low, high = (_rgb(colour) for colour in RAMP[first : first + 2])
    mixed = (round(a + (b - a) * (at - first)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def ink_on(colour: str) -> str:
    """Black or white, whichever is legible on a colour."""
    parts = [channel / 255 for channel in _rgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # Where both have the same contrast by WCAG 2.2: 1.05 / (x + .05) = (x + .05) / .05.
    return "#000" if luminance > 0.179 else "#fff"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
