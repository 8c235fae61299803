"""Who takes part in gpu_adaptive.py, by the names of its report; see `adaattn_bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_bench import contenders as known
from adaattn_bench.contenders import EXACT, Contender, Given
from adaptive_data import CUDNN, DENSE

FA3, SAGE, SPARGE = "FA3", "SageAttention", "SpargeAttn"
NAMES = {
    CUDNN: "torch cuDNN",
    DENSE: EXACT,
    FA3: "FlashAttention-3",
    SAGE: "SageAttention",
    SPARGE: "SpargeAttn",
}
"""Names of the report, and those of the package."""
ON_A_CPU = {CUDNN: "torch flash"}
"""Who stands for whom on a machine without a GPU, where only the code is tried."""


@dataclass
class Heads:
    """One causal problem: q (1, heads_q, len, dim), k and v (1, heads_kv, len, dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.q.shape[2])

    @property
    def count(self) -> int:
        """Query heads."""
        return int(self.q.shape[1])

    @property
    def given(self) -> Given:
        """The problem as contenders take it."""
        return Given.of(self.q, self.k, self.v)


def ours(heads: Heads, rel: float, **options: Any) -> Callable[[], Any]:
    """Return one whole call within a budget: probe, plan, run, certify, escalate."""
    return known.ours(heads.given, rel, **options)


def contenders(
    heads: Heads, budgets: Sequence[float], peers: Sequence[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Everybody who can compute this problem, and why the others cannot."""
    names = NAMES if heads.q.is_cuda else NAMES | ON_A_CPU
    back = {names[name]: name for name in peers}
    field = known.gather(heads.given, budgets, [n for n in back if n != EXACT])
    back |= {known.budget_name(rel): known.budget_name(rel) for rel in budgets}
    absent = {back[name]: why for name, why in field.absent.items() if name in back}
    for name, why in absent.items():
        print(f"left out: {name}: {why}", file=sys.stderr, flush=True)
    return {back[n]: found for n, found in field.found.items() if n in back}, absent
