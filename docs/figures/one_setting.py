"""Why a budget: one setting for all heads leaves errors that differ by ten."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from heads import Head, all_heads
from matplotlib.lines import Line2D
from style import BLUE, GREEN, ORANGE, save

from adaattn_core import BlockSparse, ErrorBudget, FixedPolicy, Landmark, attention
from adaattn_core.policies.base import Policy
from adaattn_core.problem import AttentionProblem
from adaattn_core.report.summary import HeadRow, head_rows, true_errors

BUDGET = 0.1
CHOICES: dict[str, Policy | None] = {
    "block-sparse, τ = 0.1\nfor every head": FixedPolicy(structure=BlockSparse(tau=0.1)),
    "landmarks, τ = 0.1\nfor every head": FixedPolicy(
        structure=Landmark(tau=0.1, band=192, clusters=8, samples=64, screen_rank=0, tail=64)
    ),
    f"budget {BUDGET:g}:\nplans differ by head": None,
}


def outcome(one: Head, policy: Policy | None, rel: float = BUDGET) -> HeadRow:
    """What a policy did with a head; None is the default one, which escalates."""
    budget = ErrorBudget(rel=rel, on_violation="report" if policy else "escalate")
    result = attention(
        one.query, one.key, one.value, **one.arguments(), budget=budget, policy=policy, seed=0
    )
    problem = AttentionProblem.from_arrays(
        one.query, one.key, one.value, mask=one.arguments()["mask"], scale=one.scale
    )
    (row,) = head_rows(result, true_errors(problem, result), "")
    return row


def draw_one_setting(length: int = 8192) -> Path:
    """True error and certificate of six heads under two fixed settings and under a budget."""
    heads = all_heads(length)
    figure, axis = plt.subplots(figsize=(7.4, 3.3))
    for column, policy in enumerate(CHOICES.values()):
        rows = [outcome(one, policy) for one in heads]
        at = column + np.linspace(-0.28, 0.28, len(rows))
        for x, row in zip(at, rows, strict=True):
            assert row.true_rows is not None
            axis.plot([x, x], [row.true_rows, row.certificate.upper], color="0.7", lw=1)
            axis.plot(x, max(row.true_rows, 1e-3), "o", color=GREEN, ms=6)
            axis.plot(x, row.certificate.upper, "_", color=BLUE, ms=12, mew=2)
        share = np.mean([row.share for row in rows])
        axis.text(column, 1.05, f"mean share {share:.2f}", ha="center", fontsize=8, color="0.3")
    axis.axhline(BUDGET, color=ORANGE, lw=1.4)
    axis.text(
        len(CHOICES) - 0.52, BUDGET * 1.06, "budget", color="#b36d00", fontsize=8, ha="right"
    )
    axis.set(yscale="log", ylim=(4e-3, 1.6), ylabel="95% row error / rms row")
    axis.set_xticks(range(len(CHOICES)), list(CHOICES))
    axis.set_xlim(-0.5, len(CHOICES) - 0.5)
    axis.legend(
        handles=[
            Line2D([], [], marker="o", ls="", color=GREEN, label="true, one head"),
            Line2D([], [], marker="_", ls="", color=BLUE, mew=2, ms=12, label="certified"),
        ],
        loc="lower left", fontsize=8, ncols=2,
    )  # fmt: skip
    axis.set_title(f"six heads of SmolLM2-135M, {length:,} tokens of prose")
    return save(figure, "one_setting")
