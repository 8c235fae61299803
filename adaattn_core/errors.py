"""Errors: one base class, three lines (got / needed / do this), facts as attributes."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Text for a terminal: line breaks become spaces, other control characters are escaped.

    What a message quotes may come from a file: it must not move the cursor, colour the screen
    or begin a line of its own.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if character in "\n\r\t":
        return " "
    return character.encode("unicode_escape").decode("ascii")


class AdaAttnError(Exception):
    """Base class of every error that AdaAttn raises on purpose.

    Parameters
    ----------
    got : str
        What the caller gave, or what was found.
    needed : str
        What the operation needs.
    do : str
        What the caller can do about it.
        Each is one line of the message, made `printable`; the attributes keep what was given.
    **facts
        Machine-readable facts; each becomes an attribute of the exception.
    """

    def __init__(self, got: str, needed: str, do: str, **facts: Any) -> None:
        super().__init__(
            f"got: {printable(got)}\nneeded: {printable(needed)}\ndo this: {printable(do)}"
        )
        self.got = got
        self.needed = needed
        self.do = do
        self.facts = dict(facts)
        for name, value in facts.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.got, self.needed, self.do, self.facts))


def _rebuild(
    cls: type[AdaAttnError], got: str, needed: str, do: str, facts: dict[str, Any]
) -> AdaAttnError:
    return cls(got=got, needed=needed, do=do, **facts)


class ShapeError(AdaAttnError, ValueError):
    """Shapes, lengths or head counts do not fit together."""


class DTypeError(AdaAttnError, TypeError):
    """An array has a data type that cannot be used here."""


class ArgumentError(AdaAttnError, ValueError):
    """An argument is outside its admissible range."""


class BudgetInfeasibleError(AdaAttnError, ValueError):
    """No format and structure of the backend keeps the budget; ``best_upper`` is attached."""


class UnsupportedError(AdaAttnError, NotImplementedError):
    """The combination is meaningful but this backend does not do it."""


class BackendUnavailableError(AdaAttnError, RuntimeError):
    """The backend exists but cannot run on this machine; ``reason`` is attached."""


class PluginError(AdaAttnError, RuntimeError):
    """A plugin is broken, or a name is claimed twice."""


class PlanError(AdaAttnError, ValueError):
    """A saved plan cannot be read, or does not fit the problem."""


class FileError(AdaAttnError, ValueError):
    """An input or output file cannot be used; ``path`` is attached."""


class KernelCompileError(AdaAttnError, RuntimeError):
    """A kernel did not compile; ``spec``, ``log`` and ``source_path`` are attached."""


class CertificateViolation(AdaAttnError, ArithmeticError):  # noqa: N818 -- a finding, not a fault
    """The certificate exceeds the budget and ``on_violation="raise"`` was asked for."""
