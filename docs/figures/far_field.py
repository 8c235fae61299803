"""Where the low rank of attention is: in the token dimension, hardly in the features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from heads import Head, all_heads
from numpy.typing import NDArray
from style import BLUE, GREEN, ORANGE, PURPLE, save

COLOURS = (BLUE, ORANGE, GREEN)
BLOCK = 1024
FEATURES = (8, 16, 24, 32, 40, 48, 56, 60, 62)
COLUMNS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class LateRows:
    """Scores (rows, keys) of a head's last rows, with hidden keys at -inf, and their values."""

    scores: Float64
    value: Float64

    @classmethod
    def of(cls, one: Head, count: int) -> LateRows:
        """The last `count` rows of a head."""
        length = one.query.shape[2]
        rows = np.arange(length - count, length)
        scores = one.scores(slice(length - count, length), slice(None))
        scores[np.arange(length) > rows[:, None]] = -np.inf
        return cls(scores, one.value[0, 0].astype(np.float64))

    def weights(self) -> Float64:
        """Softmax of the scores."""
        weights = np.exp(self.scores - self.scores.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _relative(error: Float64, exact: Float64) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(exact))


def cut_columns(late: LateRows, size: int, ranks: Iterable[int]) -> tuple[Float64, list[float]]:
    """Singular values of the weights on the first `size` keys, and what cutting them does.

    The errors are those of the rows' outputs, relative Frobenius, for each rank kept.
    """
    weights = late.weights()
    left, values, right = np.linalg.svd(weights[:, :size], full_matrices=False)
    right_out = right @ late.value[:size]
    exact = weights @ late.value
    return values, [_relative((left[:, r:] * values[r:]) @ right_out[r:], exact) for r in ranks]


def cut_features(one: Head, late: LateRows, ranks: Iterable[int]) -> list[float]:
    """Errors of the outputs with scores of the best rank-r product of all queries and keys."""
    query, key = (x[0, 0].astype(np.float64) for x in (one.query, one.key))
    # A row's shift changes no softmax, so the mean key costs no rank.
    key = key - key.mean(axis=0)
    (q_basis, q_rest), (k_basis, k_rest) = np.linalg.qr(query), np.linalg.qr(key)
    left, values, right = np.linalg.svd(one.scale * q_rest @ k_rest.T)
    left, right = q_basis[-len(late.scores) :] @ left, right @ k_basis.T
    seen = late.scores > -np.inf
    exact = late.weights() @ late.value
    errors = []
    for rank in ranks:
        scores = np.where(seen, (left[:, :rank] * values[:rank]) @ right[:rank], -np.inf)
        out = LateRows(scores, late.value).weights() @ late.value
        errors.append(_relative(out - exact, exact))
    return errors


def draw_far_field(length: int = 4096, block: int = BLOCK) -> Path:
    """Singular values of a far block; output error when it, or the features, are cut."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    for number, one in enumerate(all_heads(length)):
        look: dict[str, Any] = {
            "color": COLOURS[number % 3], "ls": "-" if number < 3 else "--", "lw": 1.3
        }  # fmt: skip
        late = LateRows.of(one, block)
        values, errors = cut_columns(late, block, COLUMNS)
        label = one.name.removeprefix("SmolLM2-135M ")
        axes[0].plot(np.arange(1, len(values) + 1), values, label=label, **look)
        axes[1].plot(COLUMNS, errors, marker=".", ms=4, **look)
        features = cut_features(one, late, FEATURES)
        axes[2].plot(FEATURES, features, marker=".", ms=4, **look)
    axes[0].set(
        xscale="log", yscale="log", ylim=(1e-4, None), xlabel="number", ylabel="singular value",
        title=f"far field: weights of {block:,} late\nqueries on {block:,} early keys",
    )  # fmt: skip
    axes[1].set(
        xscale="log", xlabel="columns kept, of " + f"{block:,}",
        title="output error when the far field\nis cut to rank r (the best one)",
    )  # fmt: skip
    axes[2].set(
        xlabel="features kept, of 64",
        title="output error when Q·Kᵀ is cut to\nrank r (after rotary embedding)",
    )  # fmt: skip
    for axis in axes[1:]:
        axis.set(yscale="log", ylim=(1e-4, 1.2), ylabel="relative error")
        axis.axhline(0.05, color=PURPLE, lw=0.8, ls=":")
        axis.text(0.99, 0.056, "5%", color=PURPLE, fontsize=8, ha="right",
                  transform=axis.get_yaxis_transform())  # fmt: skip
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=7.5, loc="lower left")
    figure.tight_layout()
    return save(figure, "far_field")
