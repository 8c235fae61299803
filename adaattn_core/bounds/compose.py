"""Theorem 8: bounds add; a sum keeps its terms' names."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaattn_core.bounds.rounding import add_up, div_up


def compose(terms: Mapping[str, float]) -> float:
    """Upper bound of the error of a chain of approximations: the sum of its named terms.

    Parameters
    ----------
    terms : mapping of str to float
        Upper bounds of the single steps, >= 0, inf allowed; NaN means that nothing is known.

    Returns
    -------
    float
        The sum rounded up; inf if a term is inf or NaN.

    References
    ----------
    This project, docs/math/08-composition.md, theorem 8 (triangle inequality).

    Examples
    --------
    >>> compose({"a": 0.0, "b": 0.25})
    0.25
    """
    if any(math.isnan(term) for term in terms.values()):
        return math.inf
    return float(add_up(*terms.values()))


def relative_terms(terms: Mapping[str, float], unit: float) -> dict[str, float]:
    """Divide terms by `unit`, rounding up; 0/0 is 0, x/0 and NaN are inf."""
    out = {}
    for name, term in terms.items():
        ratio = float(div_up(term, unit))
        out[name] = math.inf if math.isnan(ratio) else ratio
    return out
