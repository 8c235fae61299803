"""What a compiled kernel uses, read from ptxas, and what its source says it may use."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

__all__ = ["Budget", "Resources", "parse_budget", "parse_log"]

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_STACK = re.compile(r"(\d+) bytes stack frame")
_BUDGET_LINE = re.compile(r"^//\s*Budget:\s*(.+)$", re.MULTILINE)
_BUDGET_TERM = re.compile(r"^(registers|spill_bytes|stack_bytes|smem_bytes)(<=|=)(\d+)$")
_RELATIONS = {"<=": operator.le, "=": operator.eq}


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel.

    Attributes
    ----------
    registers : int
        Per thread.
    spill_bytes : int
        Spill stores plus spill loads, per thread, counted in the code.
    stack_bytes : int
        Local-memory stack frame, per thread.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Budget:
    """Terms of a header's ``// Budget:`` line."""

    terms: tuple[tuple[str, str, int], ...]

    def violations(self, resources: Resources, smem_bytes: int) -> list[str]:
        """Every term that does not hold, as text; empty when the kernel keeps its budget."""
        actual = {
            "registers": resources.registers,
            "spill_bytes": resources.spill_bytes,
            "stack_bytes": resources.stack_bytes,
            "smem_bytes": smem_bytes,
        }
        return [
            f"{what} is {actual[what]}, stated {what}{relation}{limit}"
            for what, relation, limit in self.terms
            if not _RELATIONS[relation](actual[what], limit)
        ]


def parse_log(log: str) -> Resources:
    """Read ptxas' ``-v`` report; sums over functions, so that a helper's spill is not missed.

    Raises
    ------
    ValueError
        If the log holds no report.
    """
    registers = [int(n) for n in _REGISTERS.findall(log)]
    if not registers:
        raise ValueError("no ptxas resource report in the compiler's log")
    return Resources(
        registers=max(registers),
        spill_bytes=sum(int(a) + int(b) for a, b in _SPILLS.findall(log)),
        stack_bytes=sum(int(n) for n in _STACK.findall(log)),
    )


def parse_budget(header: str) -> Budget:
    """Read the machine-readable budget of a kernel header.

    The line reads ``// Budget: registers<=255 spill_bytes=0 smem_bytes<=233472``.

    Raises
    ------
    ValueError
        If there is no such line, more than one, or a term that cannot be read.
    """
    lines = _BUDGET_LINE.findall(header)
    if len(lines) != 1:
        raise ValueError(f"{len(lines)} '// Budget:' lines in the header, needed exactly one")
    terms = []
    for text in lines[0].split():
        match = _BUDGET_TERM.match(text)
        if match is None:
            raise ValueError(f"cannot read the budget term {text!r}")
        terms.append((match[1], match[2], int(match[3])))
    return Budget(tuple(terms))
