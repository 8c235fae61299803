"""Plans that were decided before, as the planning kernels take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adaattn_core import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark, LowRank
from adaattn_cuda.planner.frozen import Frozen, frozen

SIZES = (
    Landmark(band=256, group=1024, samples=32, tile=128, screen_rank=0),
    Landmark(band=256, group=2048, samples=32, tile=128, screen_rank=0),
)


def problem(heads: int = 4) -> AttentionProblem:
    arrays = [np.zeros((1, h, 8, 8), np.float16) for h in (heads, 2, 2)]
    return AttentionProblem.from_arrays(*arrays, mask=Mask.causal())


def plan(*structures: Any, **formats: str) -> Plan:
    formats = {"qk": "f16", "pv": "f16"} | formats
    heads = {
        (0, h): HeadPlan(**formats) if s is None else HeadPlan(structure=s, **formats)
        for h, s in enumerate(structures)
    }
    return Plan(heads, seed=5)


def test_structures_are_numbered_and_dense_heads_are_not() -> None:
    loose, tight = replace(SIZES[1], tau=0.3), replace(SIZES[1], tau=0.002)
    given = plan(loose, None, tight, loose)
    found = frozen(given, problem(), SIZES)
    assert isinstance(found, Frozen)
    assert found.decided == (1, -1, 0, 1)
    assert [c.plan.structure for c in found.table.candidates] == [tight, loose]
    dense = frozen(plan(None, None, None, None), problem(), SIZES)
    assert isinstance(dense, Frozen)
    assert not dense.table.candidates


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (plan(SIZES[0], SIZES[1], None, None), "other sizes"),
        (plan(replace(SIZES[0], band=128), None, None, None), "other sizes"),
        (plan(LowRank(8), None, None, None), "low_rank"),
        (plan(None, None, None, None, qk="f32", pv="f32"), "formats"),
    ],
)
def test_what_the_kernels_do_not_run_is_said(given: Plan, reason: str) -> None:
    assert reason in str(frozen(given, problem(), SIZES))
