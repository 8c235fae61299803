"""ErrorBudget: what the caller asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from adaattn_core.checks import real, word
from adaattn_core.errors import ArgumentError

Guarantee = Literal["worst_case", "probabilistic", "sampled"]
OnViolation = Literal["escalate", "raise", "report"]


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """Error that the caller tolerates, per head.

    The sentence: with confidence `confidence`, at least a share `rows` of each head's query
    rows satisfy ``|out_i - exact_i| <= rel * rms_i |out_i|``.

    Parameters
    ----------
    rel : float
        Tolerated row error relative to the head's root-mean-square output row, > 0.
    rows : float
        Share of rows in (0, 1]; theorems hold for every row, sampling needs rows < 1.
    confidence : float
        In (0, 1]; theorems hold with confidence 1, sampling and rounding models need < 1.
    guarantee : {"sampled", "probabilistic", "worst_case"}
        What must stand behind the number (see docs/explanation/guarantees).
    on_violation : {"escalate", "raise", "report"}
        What happens where the certificate exceeds the budget.

    Raises
    ------
    ArgumentError
        If a number is outside its range or a word is unknown.
    """

    rel: float
    rows: float = 0.95
    confidence: float = 0.95
    guarantee: Guarantee = "sampled"
    on_violation: OnViolation = "escalate"

    def __post_init__(self) -> None:
        for name in ("rel", "rows", "confidence"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if not 0 < self.rel < float("inf"):
            raise ArgumentError(
                got=f"rel={self.rel}",
                needed="a positive finite relative error",
                do="pass budget=None for exact attention, or e.g. ErrorBudget(rel=0.05)",
            )
        for name in ("rows", "confidence"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ArgumentError(
                    got=f"{name}={value}",
                    needed="a number in (0, 1]",
                    do="0.95 is the usual choice for both",
                )
        word("guarantee", self.guarantee, get_args(Guarantee))
        word("on_violation", self.on_violation, get_args(OnViolation))
        if self.guarantee == "sampled" and (self.rows == 1 or self.confidence == 1):
            raise ArgumentError(
                got=f"a sampled guarantee with rows={self.rows}, confidence={self.confidence}",
                needed="both below 1: a sample cannot speak for every row with certainty",
                do='lower them, or ask for guarantee="worst_case"',
            )
        if self.guarantee == "probabilistic" and self.confidence == 1:
            raise ArgumentError(
                got="a probabilistic guarantee with confidence=1",
                needed="confidence below 1",
                do='lower it, or ask for guarantee="worst_case"',
            )


def as_budget(budget: Any) -> ErrorBudget | None:
    """Return what `attention` was given as budget: None, a budget, or the `rel` of one.

    Raises
    ------
    ArgumentError
        If it is anything else; numbers of other libraries are taken, text and booleans not.
    """
    if budget is None or isinstance(budget, ErrorBudget):
        return budget
    do = "pass an ErrorBudget, a number such as 0.1 (its rel), or None for exact attention"
    return ErrorBudget(rel=real("budget", budget, do=do))
