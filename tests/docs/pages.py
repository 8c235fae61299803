"""Pages of the documentation, and the blocks of code on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    + [p for p in DOCS.rglob("*.md") if "_build" not in p.parts]
)
FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>\w+) -->\n)?```(?P<kind>python|console)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
NEEDS_GPU = ("docs/how-to/gpu.md",)
"""Pages whose Python blocks all need a CUDA device."""


def name(page: Path) -> str:
    """Path of a page within the repository: its id in tests."""
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: ``python`` or ``console``, and what it needs that a CI machine lacks."""

    kind: str
    text: str
    needs: str


def blocks(page: Path) -> list[Block]:
    """Blocks of a page in order."""
    whole = "cuda" if name(page) in NEEDS_GPU else ""
    return [
        Block(m["kind"], m["text"], m["needs"] or whole)
        for m in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of a console block, split as a shell would; comments and output dropped.

    With prompts only prompted lines are commands; lines joined by ``&&`` are several.
    """
    text = text.replace("\\\n", " ")
    prompted = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    for line in prompted or text.splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words:
                yield words
