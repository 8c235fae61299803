"""A drawing as SVG text: boxes, arrows, labels. The same drawing is the same text."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from style import FOLDER

STYLE = """
text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #222 }
.title { font-size: 15px; font-weight: bold }
.text { font-size: 13px }
.note { font-size: 12px; fill: #555 }
.code { font-size: 12px; font-family: 'DejaVu Sans Mono', Menlo, Consolas, monospace }
"""


class Drawing:
    """Shapes on white, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        fill: str = "#ffffff",
        stroke: str = "#8a8270",
        kinds: tuple[str, ...] = ("title", "note", "note", "note"),
        radius: float = 6,
    ) -> None:
        """A rectangle with centred lines of text."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.2"/>'
        )
        step = 17
        top = y + height / 2 - step * (len(lines) - 1) / 2 + 4.5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + step * number, line, kinds[number], "middle")

    def text(
        self, x: float, y: float, line: str, kind: str = "text", at: str = "start"
    ) -> None:
        """A line of text; `at` is start, middle or end."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{at}">{escape(line)}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = "#444", dash: str = "") -> None:
        """A line through points, with a head at its end."""
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"'
            f'{dashed} marker-end="url(#head)"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#bbb") -> None:
        """A thin line."""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>'
        )

    def save(self, name: str) -> Path:
        """Write it beside this file."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="#444"/></marker>'
        )
        text = "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                f"<defs>{head}</defs>",
                f'<rect width="{width}" height="{height}" fill="#fff"/>',
                *self.parts,
                "</svg>\n",
            )
        )
        path = FOLDER / f"{name}.svg"
        path.write_text(text, encoding="utf-8")
        return path
