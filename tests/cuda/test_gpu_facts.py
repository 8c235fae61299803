"""What a run says of its numbers on a real device: norms, residuals, odd rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}


@pytest.fixture(scope="module")
def backend() -> Any:
    return CudaBackend()


def arrays(
    dtype: str = "bfloat16", length: int = 300, dim: int = 64, heads: int = 4
) -> list[Any]:
    shape = (2, heads, length, dim)
    return [torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3)]


def relative(got: Any, expected: Any) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def plan_of(problem: AttentionProblem) -> Plan:
    return Plan.uniform(problem, HeadPlan(qk=problem.dtype, pv=problem.dtype))


def true_facts(x: Any) -> tuple[Any, Any]:
    """Largest norm and largest distance between two rows, in float64, per head."""
    wide = x.double()
    return wide.norm(dim=-1).amax(-1), torch.cdist(wide, wide).amax((-1, -2))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_facts_bound_the_truth(backend, dtype: str, magnitude: float) -> None:
    if dtype == "float16":
        magnitude = {1.0: 1.0, 1e-30: 2.0**-20, 1e30: 2.0**12}[magnitude]
    q, k, v = ((x.double() * magnitude).to(x.dtype) for x in arrays(dtype, length=777))
    k = k[:, :2]
    v = (v[:, :2].double() + 3 * magnitude).to(v.dtype)
    problem = AttentionProblem.from_arrays(q, k, v, scale=1.0)
    raw = backend.run(problem, plan_of(problem))
    q_norm, k_norm, v_norm = (true_facts(x)[0].cpu().numpy() for x in (q, k, v))
    diameter = true_facts(v)[1].cpu().numpy()
    rms = raw.out.double().square().sum(-1).mean(-1).sqrt().cpu().numpy()
    for (sequence, head), facts in raw.facts.items():
        kv = (sequence, head // 2)
        for got, true in (
            (facts.query_norm_upper, q_norm[sequence, head]),
            (facts.key_norm_upper, k_norm[kv]),
            (facts.value_norm_upper, v_norm[kv]),
        ):
            assert true * (1 - 1e-12) <= got <= true * (1 + 1e-9)
        assert diameter[kv] <= facts.value_diameter_upper <= 3 * diameter[kv]
        if np.isfinite(rms[sequence, head]):
            assert 0.999999 * rms[sequence, head] <= facts.output_rms
            assert facts.output_rms <= rms[sequence, head] * (1 + 1e-12)
        assert facts.nonfinite == (not np.isfinite(rms[sequence, head]))


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_residuals_are_those_of_the_operands(backend, name: str) -> None:
    q, k, v = arrays("float32", length=300)
    q[0, 0, 5, 7] = 1e5  # beyond f16, which saturates
    problem = AttentionProblem.from_arrays(q, k, v)
    raw = backend.run(problem, Plan.uniform(problem, HeadPlan(qk=name, pv=name)))

    def lost(x: Any) -> Any:
        if name == "tf32":
            bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
            kept = bits.view(torch.float32)
        elif name == "f16":
            kept = x.clamp(-65504, 65504).half().float()
        else:
            kept = x.bfloat16().float()
        return (x.double() - kept.double()).norm(dim=-1).amax(-1).cpu().numpy()

    for (sequence, head), facts in raw.facts.items():
        true = lost(q)[sequence, head]
        assert true * (1 - 1e-12) <= facts.query_residual_upper <= true * (1 + 1e-9) + 1e-30
        assert facts.value_residual_upper >= lost(v)[sequence, head]


def test_facts_of_packed_sequences(backend) -> None:
    """Each sequence's facts are those of its own rows, as if it had been alone."""
    lengths = (70, 0, 200, 30)
    edges = tuple(int(x) for x in np.cumsum((0, *lengths)))
    q, k, v = (x[:1] for x in arrays("float32", length=edges[-1]))
    q[0, :, edges[2] :] *= 7
    mask = Mask(cu_seqlens_q=edges, cu_seqlens_kv=edges)
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    raw = backend.run(problem, plan_of(problem))
    for (sequence, head), facts in raw.facts.items():
        rows = slice(edges[sequence], edges[sequence + 1])
        if lengths[sequence]:
            true = float(true_facts(q[0, head, rows])[0])
            assert true * (1 - 1e-12) <= facts.query_norm_upper <= true * (1 + 1e-9)


def test_nonfinite_rows(backend) -> None:
    q, k, v = arrays("float32")
    v[0, 1, 3, 3] = float("nan")
    problem = AttentionProblem.from_arrays(q, k, v)
    facts = backend.run(problem, plan_of(problem)).facts
    assert facts[0, 1].nonfinite
    assert not facts[0, 0].nonfinite
    assert np.isfinite(facts[0, 1].value_norm_upper)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masked", ["none", "causal", "boolean"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflowing_scores_are_not_a_hidden_key(
    backend, dtype: str, masked: str, sign: float
) -> None:
    """A row that sees keys is right (1) or NaN, with the flag; one that sees none is 0."""
    shape = (1, 2, 300, 64)
    q, k, v = (
        torch.full(shape, x, device="cuda", dtype=getattr(torch, dtype))
        for x in (1e20, sign * 1e20, 1.0)
    )
    allowed = torch.ones(300, 300, dtype=torch.bool, device="cuda").tril(-3)
    mask = {"none": None, "causal": Mask.causal(), "boolean": Mask.boolean(allowed)}[masked]
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    raw = backend.run(problem, plan_of(problem))
    sees = allowed.any(1) if masked == "boolean" else torch.ones_like(allowed[0])
    for rows in (raw.out[0, :, sees], raw.lse[0, :, sees]):
        assert rows.isnan().all()
    assert all(facts.nonfinite for facts in raw.facts.values())
    assert (raw.out[0, :, ~sees] == 0).all()
    assert torch.isneginf(raw.lse[0, :, ~sees]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_see_nothing_ignore_their_query(backend, dtype: str) -> None:
    q, k, v = arrays(dtype)
    q[:, :, :100] = torch.nan
    mask = Mask.causal("bottom_right")  # 300 rows over 200 keys: the first 100 see none
    out, lse = backend.forward(q, k[:, :, :200], v[:, :, :200], mask=mask)
    assert (out[:, :, :100] == 0).all()
    assert torch.isneginf(lse[:, :, :100]).all()
    assert torch.isfinite(out[:, :, 100:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
def test_the_lowest_finite_number_hides_no_row(backend, dtype: str, bias_dtype: str) -> None:
    q, k, v = arrays(dtype)
    lowest = torch.finfo(getattr(torch, bias_dtype)).min
    bias = torch.zeros((300, 300), device="cuda", dtype=getattr(torch, bias_dtype))
    bias[3], bias[20:, 50:] = lowest, lowest
    bias[7], bias[7, 11] = lowest, 0.75 * lowest
    out, lse = backend.forward(q, k, v, mask=Mask.additive(bias))
    assert torch.isfinite(lse).all()
    mean = v.double().mean(2)
    assert relative(out[:, :, 3], mean) <= 4 * UNIT[dtype]
    assert relative(out[:, :, 7], v[:, :, 11]) <= UNIT[dtype]
