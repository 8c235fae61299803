"""Facts that the backend reads for certificates, of a kernel that a recorder stands in for."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backend_on_host import (
    NAMES,
    Recorder,
    host_backend,
    problem,
)

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.testing.oracles import exact_attention, rms_row_norm
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.facts import kernel_arithmetic


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    return host_backend(monkeypatch)


@pytest.mark.parametrize(("step_keys", "keys"), [(16, 16), (64, 32), (176, 32)])
def test_the_kernels_state_their_arithmetic(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, step_keys: int, keys: int
) -> None:
    """In fields of its own: steps, scores, sums, exponentials; a repaired row takes 32 keys."""
    monkeypatch.setattr(Recorder, "step_keys", step_keys)
    p = problem()
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    raw.out[...] = 1.0
    facts = raw.facts[0, 0]
    assert (facts.score_residual_upper, facts.dropped_mass_upper) == (0, 0)
    said = facts.arithmetic
    assert said.step_keys == keys
    assert said.exp_rel_upper == 2.0**-22
    assert said.score_rel_upper == (p.dim_qk / 8 + 8) * 2.0**-22 + 2.0**-21
    assert said.sum_rel_upper == (32 + 50 / (2 * keys)) * 2.0**-22 + 2.0**-21
    narrow = kernel_arithmetic("bf16", "bf16", 64, 4096, 32)
    assert narrow.score_rel_upper == 16 * 2.0**-22
    assert narrow.sum_rel_upper == (4096 / 8 + 16) * 2.0**-22


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_facts_are_upper_bounds_and_read_late(backend: CudaBackend, dtype: Any) -> None:
    p = problem(dtype, mask=Mask.causal("bottom_right"))
    name = NAMES[str(np.dtype(dtype))]
    raw = backend.run(p, Plan.uniform(p, HeadPlan(qk=name, pv=name)))
    raw.out[...] = exact_attention(p).out.astype(dtype)  # what the kernel would have written
    facts = raw.facts[0, 1]
    for array, norm, residual in (
        (p.query[0, 1], facts.query_norm_upper, facts.query_residual_upper),
        (p.key[0, 0], facts.key_norm_upper, facts.key_residual_upper),
        (p.value[0, 0], facts.value_norm_upper, facts.value_residual_upper),
    ):
        true = np.linalg.norm(array.astype(np.float64), axis=-1).max()
        assert true <= norm <= 1.001 * true
        assert residual <= 1e-30 * norm, "operands are exact"
    assert facts.keys_max == 50
    size = rms_row_norm(raw.out[0, 1].astype(np.float64))
    assert 0.999 * size <= facts.output_rms <= size
    assert set(dict(raw.facts)) == {(0, 0), (0, 1)}


@pytest.mark.parametrize(("name", "bits"), [("tf32", 11), ("bf16", 8), ("f16", 11)])
def test_residuals_of_narrower_operands(backend: CudaBackend, name: str, bits: int) -> None:
    p = problem()
    raw = backend.run(p, Plan.uniform(p, HeadPlan(qk=name, pv=name)))
    raw.out[...] = 1.0
    facts = raw.facts[0, 0]
    norm = facts.query_norm_upper
    assert 2.0 ** -(bits + 3) * norm < facts.query_residual_upper <= 2.0**-bits * norm


def test_facts_of_values_that_are_not_finite(backend: CudaBackend) -> None:
    p = problem()
    p.value[0, 0, 3, 3] = math.nan
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    raw.out[0, 0] = math.nan
    raw.out[0, 1] = 1.0
    assert raw.facts[0, 0].nonfinite
    assert not raw.facts[0, 1].nonfinite
    assert math.isfinite(raw.facts[0, 1].value_norm_upper)


def test_facts_of_escalated_heads_are_measured_again(backend: CudaBackend) -> None:
    p = problem()
    plan = Plan.uniform(p, HeadPlan(qk="bf16", pv="bf16"))
    raw = backend.run(p, plan)
    raw.out[...] = 1.0
    before = raw.facts[0, 1].query_residual_upper
    backend.run(p, plan.with_heads({(0, 1): HeadPlan()}), heads=[(0, 1)], into=raw)
    assert raw.facts[0, 1].query_residual_upper < 1e-30 < before
    assert raw.facts[0, 0].query_residual_upper == pytest.approx(before, rel=0.5)


def test_facts_of_an_empty_additive_mask(backend: CudaBackend) -> None:
    p = problem(mask=Mask.additive(np.zeros((0, 50), np.float32)), len_q=0)
    raw = backend.run(p, Plan.uniform(p, HeadPlan()))
    assert raw.facts[0, 0].bias_max_abs == 0
