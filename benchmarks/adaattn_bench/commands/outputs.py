"""Where ``bench`` and ``eval`` put what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import typer

from adaattn_bench.clock import EXIT_SIGNAL
from adaattn_core.files import atomic_write_text, check_writable
from adaattn_core.report.figure import can_draw
from adaattn_core.report.tables import print_json

Found = dict[str, Any]


class Shown(Protocol):
    """A module that shows a report."""

    def markdown(self, report: Found, figure: str | None = None) -> str:
        """Return a page of documentation."""

    def plot(self, report: Found, path: Path) -> None:
        """Write the figure."""

    def page(self, report: Found) -> str:
        """Return a self-contained HTML page."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files that are written; known to be writable before anything is measured.

    Attributes
    ----------
    files : tuple of Path
        JSON, Markdown and, where matplotlib is installed, PNG of one stem.
    page : Path or None
    """

    files: tuple[Path, ...]
    page: Path | None

    @classmethod
    def checked(cls, folder: Path | None, stem: str, page: Path | None) -> Outputs:
        """Make the folder, and see that everything can be written.

        Raises
        ------
        FileError
            If something cannot.
        """
        files: tuple[Path, ...] = ()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kinds = (".json", ".md", ".png") if can_draw() else (".json", ".md")
            files = tuple(folder / f"{stem}{kind}" for kind in kinds)
        for path in (*files, *([page] if page else ())):
            check_writable(path)
        return cls(files, page)

    def write(self, found: Found, shown: Shown) -> None:
        """Write everything."""
        figure = next((path.name for path in self.files if path.suffix == ".png"), None)
        for path in self.files:
            if path.suffix == ".json":
                atomic_write_text(path, json.dumps(found, indent=1) + "\n")
            elif path.suffix == ".md":
                atomic_write_text(path, shown.markdown(found, figure))
            else:
                shown.plot(found, path)
        if self.page is not None:
            atomic_write_text(self.page, shown.page(found))


def tell(found: Found, as_json: bool, show: Callable[[Found], None]) -> None:
    """Print a report, and exit as a signal asks for that cut it short."""
    if as_json:
        print_json(found)
    else:
        show(found)
    if found["interrupted"]:
        raise typer.Exit(EXIT_SIGNAL + found["interrupted"])
