"""What the planning kernels are not given: said without a device."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaattn_core.budget import ErrorBudget
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import Candidate, DecisionTable
from adaattn_core.problem import AttentionProblem
from adaattn_cuda import adaptive
from adaattn_cuda.adaptive import LEAST_KEYS, SIZES
from adaattn_cuda.device import driver

DENSE = DecisionTable((), HeadPlan(qk="bf16", pv="bf16"), 0.1, 0.0, 1.0)


def why(
    monkeypatch: pytest.MonkeyPatch, len_q: int, len_kv: int, mask: Mask, table: DecisionTable
) -> str:
    monkeypatch.setattr(driver, "device_facts", lambda _: SimpleNamespace(arch="sm_90a"))
    query, key = (np.zeros((1, 1, n, 8), ml_dtypes.bfloat16) for n in (len_q, len_kv))
    problem = AttentionProblem.from_arrays(query, key, key, mask=mask)
    return adaptive.refusal(problem, table, ErrorBudget(0.1), 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["top_left", "bottom_right"]))
def test_every_row_sees_a_key_and_every_key_is_seen_where_a_call_is_taken(
    monkeypatch: pytest.MonkeyPatch, len_q: int, len_kv: int, alignment: str
) -> None:
    """Norms, probes and pools of the planning kernels speak of all rows and all keys."""
    shift = len_kv - len_q if alignment == "bottom_right" else 0
    seen = np.arange(len_kv)[None] <= np.arange(len_q)[:, None] + shift
    taken = not why(monkeypatch, len_q, len_kv, Mask.causal(alignment), DENSE)
    if taken:
        assert seen.any(axis=0).all()
        assert seen.any(axis=1).all()
    elif alignment == "bottom_right":
        assert len_q > len_kv
    else:
        assert len_q < len_kv


def test_short_problems_are_taken_where_nothing_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    landmark = Candidate(HeadPlan(SIZES[0], "bf16", "bf16"), 0.0, 1.0)
    judged = DecisionTable((landmark,), DENSE.fallback, 0.1, 0.0, 1.0)
    assert why(monkeypatch, 1, 4000, Mask(), DENSE) == ""
    assert "shorter" in why(monkeypatch, LEAST_KEYS - 1, 4000, Mask(), judged)
    assert "shorter" not in why(monkeypatch, LEAST_KEYS, 4000, Mask(), judged)
