"""Certificates: one sentence per head about the error of the returned output.

With confidence `confidence`, at least a share `rows` of the head's query rows that see a key
satisfy ``|out_i - exact_i| <= upper * rms_i |out_i|``. The rms is that of all rows of the head:
rows that see nothing are 0, exactly, and make the unit smaller, never the share larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.budget import ErrorBudget
from adaattn_core.lazy import LazyHeads
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


class HeadTable(Mapping[HeadIndex, HeadCertificate]):
    """Certificates of several heads as arrays; a head's own sentence is made when looked at.

    Parameters
    ----------
    index : sequence of (sequence, head)
    columns : dict of str to ndarray, shape (heads,)
        Fields of `HeadCertificate` by name, `terms` aside.
    terms : dict of str to ndarray, shape (heads,)
    """

    def __init__(
        self,
        index: Sequence[HeadIndex],
        columns: dict[str, NDArray[Any]],
        terms: dict[str, NDArray[np.float64]],
    ) -> None:
        self.index, self.columns, self.terms = tuple(index), columns, terms
        self._rows: dict[HeadIndex, int] | None = None

    def __getitem__(self, index: HeadIndex) -> HeadCertificate:
        if self._rows is None:
            self._rows = {head: row for row, head in enumerate(self.index)}
        row = self._rows[index]
        said: dict[str, Any] = {
            name: x if isinstance(x := column[row], str) else x.item()
            for name, column in self.columns.items()
        }
        return HeadCertificate(
            terms={name: float(column[row]) for name, column in self.terms.items()}, **said
        )

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def holding(self, budget: ErrorBudget) -> NDArray[np.bool_]:
        """Whether each head's sentence is at least as strong as what `budget` asks for."""
        c = self.columns
        least = GUARANTEE_STRENGTH[budget.guarantee]
        strong = [name for name, strength in GUARANTEE_STRENGTH.items() if strength >= least]
        kept = (c["upper"] <= budget.rel) & (c["rows"] >= budget.rows)
        kept &= c["confidence"] >= budget.confidence
        return np.asarray(kept & np.isin(c["guarantee"].astype(str), strong))


_NOTHING_CLAIMED: dict[str, Any] = {
    "upper": np.inf,
    "estimate": np.nan,
    "rows": 0.0,
    "confidence": 0.0,
    "guarantee": "",
    "nonfinite": False,
}
"""What stands in the arrays for a head without a certificate."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Certificates of every head, and the same numbers as arrays (sequences, heads_q).

    A head missing from `heads` claims nothing: its upper bound is inf, its shares are 0.
    """

    heads: Mapping[HeadIndex, HeadCertificate]
    shape: tuple[int, int]

    def __getitem__(self, index: HeadIndex) -> HeadCertificate:
        return self.heads[index]

    def _table(self) -> HeadTable | None:
        """Return the heads as arrays, where they are known so."""
        heads = self.heads.made() if isinstance(self.heads, LazyHeads) else self.heads
        return heads if isinstance(heads, HeadTable) else None

    def _array(self, name: str, dtype: Any) -> NDArray[Any]:
        out = np.full(self.shape, _NOTHING_CLAIMED[name], dtype)
        table = self._table()
        if table is not None and len(table):
            out[tuple(np.array(table.index).T)] = table.columns[name]
            return out
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
        return not self.violations(budget)

    def violations(self, budget: ErrorBudget) -> tuple[HeadIndex, ...]:
        """Heads that do not keep the budget."""
        table = self._table()
        if table is not None:
            return tuple(table.index[row] for row in np.flatnonzero(~table.holding(budget)))
        return tuple(i for i, head in self.heads.items() if not head.holds(budget))

    def merge(self, newer: Certificate) -> Certificate:
        """Return this certificate with the heads of `newer` replaced."""
        return Certificate({**self.heads, **newer.heads}, self.shape)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
