"""What each structure computes of one real head's score matrix, found out from outside.

A structure is run on values that are the unit vectors: the output is then the matrix of weights
that every key really had. A weight that equals the exact exponential of the row's score was
computed; another one that is not zero was approximated; zero was left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from heads import Head, head
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch
from numpy.typing import NDArray
from style import BLUE, HIDDEN, ORANGE, PALE_BLUE, WHITE, rgb, save

from adaattn_core import (
    BlockSparse,
    Dense,
    ErrorBudget,
    FixedPolicy,
    Landmark,
    LowRank,
    ScoreSkip,
    attention,
)
from adaattn_core.problem import AttentionProblem
from adaattn_core.report.summary import head_rows, true_errors
from adaattn_core.structure import Structure

LEFT_OUT, SCORED, APPROXIMATED, COMPUTED, UNSEEN = range(5)
COLOURS = {
    COMPUTED: BLUE,
    APPROXIMATED: ORANGE,
    SCORED: PALE_BLUE,
    LEFT_OUT: WHITE,
    UNSEEN: HIDDEN,
}
AGREES = 1e-3
"""Relative difference of a float32 weight from the exact one that rounding explains."""
SHOWN: dict[str, Structure] = {
    "dense": Dense(),
    "score_skip": ScoreSkip(lam=1e-3, tile_kv=1),
    "low_rank, rank 56 of 64": LowRank(rank=56),
    "block_sparse": BlockSparse(tau=0.1),
    "landmark": Landmark(
        tau=0.05, band=192, clusters=4, samples=64, screen_rank=0, tail=64, group=512
    ),
}


@dataclass(frozen=True)
class Picture:
    """What a structure did with a head.

    Attributes
    ----------
    kind : ndarray of int, shape (len, len)
        One of the five kinds above for every score.
    share : float
        Of the visible scores, as the run reports it.
    error : float
        True 95% quantile of the rows' errors relative to the rms row.
    """

    kind: NDArray[np.int8]
    share: float
    error: float


def picture(one: Head, structure: Structure) -> Picture:
    """Run a structure on a head, and find out what it did."""
    policy = FixedPolicy(structure=structure)
    result = attention(
        one.query, one.key, one.value, **one.arguments(), policy=policy, seed=0,
        budget=ErrorBudget(rel=0.1, on_violation="report"),
    )  # fmt: skip
    problem = AttentionProblem.from_arrays(
        one.query, one.key, one.value, mask=one.arguments()["mask"], scale=one.scale
    )
    (row,) = head_rows(result, true_errors(problem, result), "")
    assert row.true_rows is not None
    return Picture(kinds(one, result.plan, structure), row.share, row.true_rows)


def kinds(one: Head, plan: Any, structure: Structure) -> NDArray[np.int8]:
    """What the plan does with every score: one of the five kinds."""
    size = one.query.shape[2]
    unit = np.eye(size, dtype=np.float32)[None, None]
    weights = np.asarray(attention(one.query, one.key, unit, **one.arguments(), plan=plan).out)[
        0, 0
    ]
    lse = np.asarray(attention(one.query, one.key, unit, **one.arguments(), plan=plan).lse)
    exact = np.exp(one.scores(slice(None), slice(None)) - lse[0, 0][:, None])
    kind = np.where(np.abs(weights - exact) <= AGREES * exact, COMPUTED, APPROXIMATED)
    kind[weights == 0] = SCORED if isinstance(structure, ScoreSkip) else LEFT_OUT
    kind[np.triu_indices(size, 1)] = UNSEEN
    return kind.astype(np.int8)


def coloured(kind: NDArray[np.int8], pixels: int) -> NDArray[np.float64]:
    """Image of the kinds; a pixel is the mean colour of the scores under it."""
    table = np.array([rgb(COLOURS[k]) for k in range(len(COLOURS))])
    side = len(kind) // pixels
    image = table[kind[: side * pixels, : side * pixels]]
    return image.reshape(pixels, side, pixels, side, 3).mean(axis=(1, 3))


def draw_structures(length: int = 2048, pixels: int = 512) -> Path:
    """Six panels: what a head attends to, and what five structures compute of that."""
    one = head(9, 2, length)
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 6.3))
    _draw_weights(axes[0, 0], one, pixels)
    for axis, (name, structure) in zip(axes.flat[1:], SHOWN.items(), strict=True):
        found = picture(one, structure)
        axis.imshow(coloured(found.kind, pixels), extent=(0, length, length, 0))
        error = f"{found.error:.2f}" if found.error >= 0.005 else f"{found.error:.0e}"
        axis.set_title(f"{name}\nshare {found.share:.2f}, 95% row error {error}")
    for axis in axes.flat:
        axis.set(xticks=[0, length], yticks=[0, length])
        axis.tick_params(length=0)
    axes[1, 0].set(xlabel="key", ylabel="query")
    figure.legend(
        handles=[
            Patch(facecolor=BLUE, label="computed"),
            Patch(facecolor=PALE_BLUE, label="score only"),
            Patch(facecolor=ORANGE, label="approximated"),
            Patch(facecolor=WHITE, edgecolor="0.6", label="left out"),
            Patch(facecolor=HIDDEN, label="hidden by the mask"),
        ],
        loc="lower center", ncols=5, fontsize=8, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    figure.suptitle(f"{one.name}, {length:,} tokens of prose", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return save(figure, "structures", dpi=130)


def _draw_weights(axis: Any, one: Head, pixels: int) -> None:
    scores = one.scores(slice(None), slice(None))
    size = len(scores)
    scores[np.triu_indices(size, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    side = size // pixels
    largest = weights.reshape(pixels, side, pixels, side).max(axis=(1, 3))
    colours = plt.get_cmap("Blues").with_extremes(bad=HIDDEN, under=WHITE)
    shown = np.ma.masked_where(np.triu(np.ones_like(largest, bool), 1), largest)
    axis.imshow(
        shown, extent=(0, size, size, 0), cmap=colours, norm=LogNorm(1e-4, 0.3),
        interpolation="nearest",
    )  # fmt: skip
    axis.set_title("softmax weights of the head\nwhite below 0.0001, dark from 0.3")


def draw_landmark(length: int = 4096, pixels: int = 1024) -> Path:
    """One landmark head, large, with its parts named."""
    one = head(9, 1, length)
    result = attention(
        one.query, one.key, one.value, **one.arguments(), budget=0.1, seed=0,
        policy=FixedPolicy(structure=Landmark(
            tau=0.1, band=192, clusters=4, samples=64, screen_rank=0, tail=128, group=1024
        )),
    )  # fmt: skip
    structure = result.plan[0, 0].structure
    kind = kinds(one, result.plan, structure)
    figure, axis = plt.subplots(figsize=(7.2, 6.2))
    axis.imshow(coloured(kind, pixels), extent=(0, length, length, 0))
    axis.set(
        xlabel="key", ylabel="query", xticks=[0, length], yticks=[*range(0, length + 1, 1024)]
    )
    at = {"fontsize": 8.5, "va": "center", "arrowprops": {"arrowstyle": "-|>", "color": "0.25"}}
    right = length * 1.03
    axis.annotate(
        "near field: each tile of 64\nqueries, and 192 keys before it", (1990, 2000),
        (right, 1500), **at,
    )  # fmt: skip
    axis.annotate(
        "landmarks (blue lines): the\nkeys that carry the far mass,\n"
        "chosen for each cluster of\nlike queries",
        (1830, 2700), (right, 2600), **at,
    )  # fmt: skip
    axis.annotate(
        "pools: 64 far keys as one\ncolumn (orange)", (2500, 3380), (right, 3420), **at
    )
    axis.annotate("exact tail: the last tiles", (length, 4040), (right, 3980), **at)
    share = result.facts[0, 0].share
    axis.set_title(
        f"{one.name}, {length:,} tokens: {share:.0%} of the scores computed,\n95% of the rows "
        f"within {result.certificate[0, 0].upper:.3f} of the rms row (certified)"
    )
    return save(figure, "landmark", dpi=130)
