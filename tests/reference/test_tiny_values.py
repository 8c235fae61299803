"""Values near the end of the float32 range: the FP8 quantum must not swallow them."""

from __future__ import annotations

import numpy as np
import pytest

from adaattn_core import AttentionProblem, HeadPlan, Plan
from adaattn_core.certificates.theorem import theorem_certificate
from adaattn_core.testing.oracles import exact_attention, row_errors
from adaattn_reference.backend import NumpyBackend

BACKEND = NumpyBackend()


@pytest.mark.parametrize("p_scale", [1.0, 448.0])
@pytest.mark.parametrize("exponent", [-36, -34, -32, -30, 0])
def test_e4m3_sums_stay_within_their_certificate(p_scale, exponent):
    plan = HeadPlan(qk="f32", pv="e4m3", p_scale=p_scale)
    closest = 0.0
    for seed in range(20):
        rng = np.random.default_rng((seed, abs(exponent)))
        shape = (1, 1, int(rng.integers(2, 300)), 16)
        q, k, v = (rng.standard_normal(shape, np.float32) for _ in range(3))
        problem = AttentionProblem.from_arrays(q, k, v * np.float32(10.0**exponent))
        raw = BACKEND.run(problem, Plan.uniform(problem, plan))
        facts = raw.facts[0, 0]
        upper = theorem_certificate(
            facts, plan, dim_qk=16, dim_v=16, scale=problem.scale, dtype="f32", len_q=shape[2]
        ).upper
        error = row_errors(raw.out[0, 0], exact_attention(problem).out[0, 0]).max()
        assert error <= upper * facts.output_rms
        closest = max(closest, error / (upper * facts.output_rms))
    # Not vacuous where the values are normal numbers.
    assert closest > 0.01 or exponent < -30
