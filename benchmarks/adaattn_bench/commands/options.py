"""Options and the progress line that ``bench`` and ``eval`` share."""

from __future__ import annotations

from types import TracebackType

from adaattn_core.errors import ArgumentError
from adaattn_core.report.tables import progress


def wholes(flag: str, text: str) -> tuple[int, ...]:
    """Turn positive whole numbers between commas into numbers.

    Raises
    ------
    ArgumentError
        If one is none.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ArgumentError(
            got=f"{flag} {text}",
            needed="positive whole numbers, separated by commas",
            do=f"e.g. {flag} 64,128",
        )
    return found


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Turn positive numbers between commas into numbers.

    Raises
    ------
    ArgumentError
        If one is none.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < x < float("inf") for x in found):
        raise ArgumentError(
            got=f"{flag} {text}",
            needed="positive numbers, separated by commas",
            do=f"e.g. {flag} 0.1,0.2",
        )
    return found


class Steps:
    """A progress bar whose words say what is done now; silent where nobody looks."""

    def __init__(self, name: str, total: int) -> None:
        self._bar = progress()
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Say what comes next; "" says that a step is done."""
        if text:
            self._bar.update(self._task, description=text)
        else:
            self._bar.advance(self._task)
