"""A real certificate: errors of all rows, the rows that were drawn, and the one that bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from heads import Head, head
from numpy.typing import NDArray
from style import BLUE, GREEN, ORANGE, save

from adaattn_core import AttentionResult, ErrorBudget, attention
from adaattn_core.facts import RowErrors
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import exact_attention
from adaattn_reference.backend import NumpyBackend

BUDGET = 0.1
ORDINALS = ("", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
LEAST = 3e-4
"""Smallest error drawn: rows whose near field holds all they see err by rounding alone."""


class Recording(NumpyBackend):
    """The NumPy backend; keeps the errors of the rows that were drawn last."""

    drawn: RowErrors

    def row_errors(self, *arguments: Any, **options: Any) -> Any:
        """Errors of drawn rows."""
        errors: dict[Any, RowErrors] = super().row_errors(*arguments, **options)  # type: ignore[assignment]
        (self.drawn,) = errors.values()
        return errors


def certified(one: Head) -> tuple[AttentionResult, RowErrors, NDArray[np.float64]]:
    """A result, the errors of its drawn rows, and in units of the rms row those of all."""
    backend = Recording()
    chosen = one.arguments() | {"backend": backend}
    result = attention(
        one.query, one.key, one.value, **chosen, seed=0, budget=ErrorBudget(rel=BUDGET)
    )
    problem = AttentionProblem.from_arrays(
        one.query, one.key, one.value, mask=chosen["mask"], scale=one.scale
    )
    exact = exact_attention(problem).out[0, 0]
    out = np.asarray(result.out, np.float64)[0, 0]
    unit = result.facts[0, 0].output_rms
    return result, backend.drawn, np.linalg.norm(out - exact, axis=1) / unit


def draw_certificate(length: int = 8192) -> Path:
    """Histogram of all rows' errors with the drawn rows below and what they certify."""
    one = head(16, 1, length)
    result, sample, every = certified(one)
    drawn = sample.error / result.facts[0, 0].output_rms
    certificate = result.certificate[0, 0]
    rank = int((drawn <= certificate.upper).sum())
    truth = float(np.quantile(every, certificate.rows, method="higher"))
    figure, (axis, rug) = plt.subplots(
        2,
        1,
        figsize=(7.6, 3.9),
        sharex=True,
        height_ratios=(5, 1),
        gridspec_kw={"hspace": 0.08},
    )
    bins = np.geomspace(LEAST, 1.0, 70)
    left = int((every < LEAST).sum())
    axis.hist(
        every,
        bins,
        color="#bcd2e8",
        label=f"errors of all {len(every):,} rows (truth)"
        f";\n{left} near the start are below {LEAST:g}",
    )
    axis.set(xscale="log", ylabel="rows", xlim=(LEAST, 1.0))
    lines = (
        (truth, GREEN, f"true {certificate.rows:.0%} quantile: {truth:.3f}"),
        (certificate.upper, BLUE, f"certified upper: {certificate.upper:.3f}"),
        (BUDGET, ORANGE, f"budget: {BUDGET:g}"),
    )
    for at, colour, label in lines:
        axis.axvline(at, color=colour, lw=1.6, label=label)
        rug.axvline(at, color=colour, lw=1.6)
    rug.vlines(drawn, 0, 1, color="0.25", lw=0.6)
    rug.set(yticks=[], ylim=(0, 1), xlabel="error of a row / rms output row")
    rug.set_ylabel(f"{len(drawn)} drawn", rotation=0, ha="right", va="center")
    axis.legend(loc="upper left", fontsize=8)
    axis.set_title(
        f"{one.name}, {result.facts[0, 0].share:.0%} of the scores computed.\n"
        f"Of {len(drawn)} rows drawn after the plan was fixed, the "
        f"{ORDINALS[len(drawn) - rank]} largest error is certified: "
        f"confidence {certificate.confidence:.0%}"
    )
    return save(figure, "certificate")
