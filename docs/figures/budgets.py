"""What a budget buys on six real heads: share of scores left to compute, and errors."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from heads import all_heads
from one_setting import outcome
from style import BLUE, GREEN, ORANGE, save

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.4)


def draw_budgets(length: int = 8192) -> Path:
    """Shares and errors of every head at five budgets; the plans are those for a CPU."""
    heads = all_heads(length)
    figure, (shares, errors) = plt.subplots(1, 2, figsize=(8.2, 3.2))
    rows = {rel: [outcome(one, None, rel) for one in heads] for rel in BUDGETS}
    for number in range(len(heads)):
        of_head = [rows[rel][number].share for rel in BUDGETS]
        shares.plot(BUDGETS, of_head, ".-", color="0.75", lw=1)
    mean = [sum(row.share for row in rows[rel]) / len(heads) for rel in BUDGETS]
    shares.plot(BUDGETS, mean, "o-", color=BLUE, lw=1.8, label="mean of six heads")
    shares.set(ylim=(0, 1.05), ylabel="share of the scores computed", xlabel="budget")
    for rel in BUDGETS:
        for row in rows[rel]:
            assert row.true_rows is not None
            if row.plan.structure.kind != "dense":
                errors.plot(rel, row.certificate.upper, "_", color=BLUE, ms=10, mew=1.6)
                errors.plot(rel, row.true_rows, "o", color=GREEN, ms=4)
    errors.plot(BUDGETS, BUDGETS, color=ORANGE, lw=1.4, label="budget")
    errors.plot([], [], "_", color=BLUE, ms=10, mew=1.6, label="certified")
    errors.plot([], [], "o", color=GREEN, ms=4, label="true")
    errors.set(yscale="log", xlabel="budget", ylabel="95% row error / rms row")
    for axis in (shares, errors):
        axis.set_xscale("log")
        axis.set_xticks(BUDGETS, [f"{rel:g}" for rel in BUDGETS])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.suptitle(f"SmolLM2-135M, {length:,} tokens of prose; heads that ran dense not shown "
                    "on the right", fontsize=9)  # fmt: skip
    figure.tight_layout()
    return save(figure, "budgets")
