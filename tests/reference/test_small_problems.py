"""Empty and short problems, and masks that leave no far field: every policy has an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.errors import UnsupportedError
from adaattn_core.policies import CalibratedPolicy, EntropyPolicy, FixedPolicy
from adaattn_core.structure import BlockSparse, Landmark, LowRank, ScoreSkip

EAGER = EntropyPolicy(least_len=0, entropy_diffuse=2, landmark_share=1)
SMALL = Landmark(group=64, tile=16, pool=16, band=16, samples=8, clusters=2, tail=0)
POLICIES = (
    "budget",
    "entropy",
    EAGER,
    *map(FixedPolicy, (LowRank(1), ScoreSkip(), BlockSparse(), Landmark(), SMALL)),
)
BUDGETS = (
    0.1,
    ErrorBudget(0.1, 1, 1, "worst_case", on_violation="report"),
    ErrorBudget(0.1, guarantee="probabilistic", on_violation="report"),
)


def arrays(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


@settings(deadline=None)
@given(
    batch=st.integers(0, 2),
    len_q=st.sampled_from((0, 1, 2, 17, 64, 65, 130, 200)),
    len_kv=st.sampled_from((0, 1, 3, 15, 16, 20, 63, 64, 65, 200)),
    dim=st.sampled_from((1, 2, 16)),
    causal=st.booleans(),
    policy=st.sampled_from(POLICIES),
    budget=st.sampled_from(BUDGETS),
)
def test_every_size_has_an_answer(
    batch: int, len_q: int, len_kv: int, dim: int, causal: bool, policy: Any, budget: Any
) -> None:
    mask = Mask.causal("bottom_right") if causal else Mask.none()
    q, k, v = arrays((batch, 2, len_q, dim), (batch, 1, len_kv, dim), (batch, 1, len_kv, 3))
    result = attention(q, k, v, mask=mask, budget=budget, policy=policy, seed=0)
    assert result.out.shape == (batch, 2, len_q, 3)
    assert result.certificate.upper.shape == (batch, 2)
    assert not np.isnan(result.certificate.upper).any()
    again = attention(q, k, v, mask=mask, plan=result.plan)
    np.testing.assert_array_equal(again.out, result.out)


def long_masks(length: int) -> dict[str, Mask]:
    allowed = np.tri(length, dtype=bool)
    return {
        "window": Mask.sliding_window(100),
        "boolean": Mask.boolean(allowed),
        "additive": Mask.additive(np.where(allowed, 0.0, -np.inf).astype(np.float32)),
    }


@pytest.mark.parametrize("name", ["window", "boolean", "additive"])
def test_landmark_plans_meet_masks_without_a_far_field(name: str) -> None:
    q, k, v = arrays(*[(1, 2, 300, 16)] * 3)
    mask = long_masks(300)[name]
    planned = attention(q, k, v, mask=mask, budget=0.2, policy=EAGER, seed=0).plan
    assert {head.structure.kind for head in planned.heads.values()} != {"landmark"}
    attention(q, k, v, mask=mask, plan=planned)
    frozen = attention(q, k, v, mask=Mask.causal(), policy=FixedPolicy(SMALL), seed=0).plan
    result = attention(q, k, v, mask=mask, policy=CalibratedPolicy(plans={"": frozen}))
    assert {head.structure.kind for head in result.plan.heads.values()} == {"dense"}
    assert "dense: landmarks need" in result.plan[0, 0].reason
    with pytest.raises(UnsupportedError):  # a plan is run as it stands
        attention(q, k, v, mask=mask, plan=frozen)


def test_a_window_that_cuts_nothing_off_keeps_landmarks() -> None:
    q, k, v = arrays(*[(1, 2, 300, 16)] * 3)
    frozen = attention(q, k, v, mask=Mask.causal(), policy=FixedPolicy(SMALL), seed=0).plan
    wide = attention(
        q, k, v, mask=Mask.sliding_window(299), policy=CalibratedPolicy(plans={"": frozen})
    )
    assert {head.structure.kind for head in wide.plan.heads.values()} == {"landmark"}
