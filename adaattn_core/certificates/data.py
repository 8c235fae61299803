"""Certificates: one sentence per head about the error of the returned output.

With confidence `confidence`, at least a share `rows` of the head's query rows that see a key
satisfy ``|out_i - exact_i| <= upper * rms_i |out_i|``. The rms is that of all rows of the head:
rows that see nothing are 0, exactly, and make the unit smaller, never the share larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.budget import ErrorBudget
from adaattn_core.problem import HeadIndex

GUARANTEE_STRENGTH = {"none": 0, "sampled": 1, "probabilistic": 2, "worst_case": 3}
"""A theorem may stand in for a sample, never the reverse."""


@dataclass(frozen=True, slots=True)
class HeadCertificate:
    """The sentence for one head.

    Attributes
    ----------
    guarantee : {"worst_case", "probabilistic", "sampled", "none"}
        What stands behind `upper`; ``"none"`` means that only the estimate is given.
    upper : float
        Upper bound of the row error relative to the head's rms output row; inf if nothing is
        known.
    rows, confidence : float
        The quantifiers of the sentence.
    estimate : float
        Estimated relative Frobenius error (NaN when nothing was sampled). Never a bound.
    terms : mapping of str to float
        The bound's summands by source, so that the binding one can be named.
    nonfinite : bool
        Whether the output holds NaN or Inf; then `upper` is inf.
    """

    guarantee: str
    upper: float
    rows: float
    confidence: float
    estimate: float = float("nan")
    terms: Mapping[str, float] = field(default_factory=dict)
    nonfinite: bool = False

    def holds(self, budget: ErrorBudget) -> bool:
        """Whether this sentence is at least as strong as what `budget` asks for."""
        return (
            GUARANTEE_STRENGTH[self.guarantee] >= GUARANTEE_STRENGTH[budget.guarantee]
            and self.upper <= budget.rel
            and self.rows >= budget.rows
            and self.confidence >= budget.confidence
        )

    def binding_term(self) -> str:
        """Name of the largest summand of the bound."""
        return max(self.terms, key=lambda name: self.terms[name]) if self.terms else ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary (non-finite numbers as null)."""
        return {
            "guarantee": self.guarantee,
            "upper": _finite(self.upper),
            "rows": self.rows,
            "confidence": self.confidence,
            "estimate": _finite(self.estimate),
            "terms": {name: _finite(value) for name, value in self.terms.items()},
            "nonfinite": self.nonfinite,
        }


@dataclass(frozen=True, slots=True)
class Certificate:
    """Certificates of every head, and the same numbers as arrays (sequences, heads_q)."""

    heads: Mapping[HeadIndex, HeadCertificate]
    shape: tuple[int, int]

    def __getitem__(self, index: HeadIndex) -> HeadCertificate:
        return self.heads[index]

    def _array(self, name: str, dtype: Any) -> NDArray[Any]:
        out = np.empty(self.shape, dtype)
        for index, head in self.heads.items():
            out[index] = getattr(head, name)
        return out

    @property
    def upper(self) -> NDArray[np.float64]:
        """Upper bounds, shape (sequences, heads_q)."""
        return self._array("upper", np.float64)

    @property
    def estimate(self) -> NDArray[np.float64]:
        """Estimated relative Frobenius errors, shape (sequences, heads_q)."""
        return self._array("estimate", np.float64)

    @property
    def rows(self) -> NDArray[np.float64]:
        """Row shares, shape (sequences, heads_q)."""
        return self._array("rows", np.float64)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Confidences, shape (sequences, heads_q)."""
        return self._array("confidence", np.float64)

    @property
    def guarantee(self) -> NDArray[np.object_]:
        """Guarantees as words, shape (sequences, heads_q)."""
        return self._array("guarantee", object)

    @property
    def nonfinite(self) -> NDArray[np.bool_]:
        """Heads whose output holds NaN or Inf, shape (sequences, heads_q)."""
        return self._array("nonfinite", bool)

    def holds(self, budget: ErrorBudget) -> bool:
        """Whether every head keeps the budget."""
        return all(head.holds(budget) for head in self.heads.values())

    def violations(self, budget: ErrorBudget) -> tuple[HeadIndex, ...]:
        """Heads that do not keep the budget."""
        return tuple(i for i, head in self.heads.items() if not head.holds(budget))

    def merge(self, newer: Certificate) -> Certificate:
        """Return this certificate with the heads of `newer` replaced."""
        return Certificate({**self.heads, **newer.heads}, self.shape)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
