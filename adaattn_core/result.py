"""AttentionResult: the output with everything that is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaattn_core.certificates.data import Certificate
from adaattn_core.facts import RunFacts
from adaattn_core.plan import Plan
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import ProblemStats


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """What `adaattn_core.attention` returns.

    Attributes
    ----------
    out : array, shape (batch, heads_q, len_q, dim_v) or the caller's layout
        Same library, device and dtype as the query.
    lse : array of float32, shape (batch, heads_q, len_q)
        Natural log of the sum of exponentials; -inf where a row sees nothing.
    plan : Plan
        What finally ran, escalations included.
    certificate : Certificate
    provenance : mapping of str to object
        Backend, versions, seed, what was escalated: what computed this.
    stats : ProblemStats or None
        What was measured; None where nothing was.
    facts : mapping of (sequence, head) to RunFacts
        What the run found out about each head, the share of scores kept among it.
    """

    out: Any
    lse: Any
    plan: Plan
    certificate: Certificate
    provenance: Mapping[str, Any]
    stats: ProblemStats | None
    facts: Mapping[HeadIndex, RunFacts]
