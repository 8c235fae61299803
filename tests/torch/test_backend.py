"""The backend ``torch``: the conformance kit, and what it shares with its neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import adaattn_torch
from adaattn_core import ErrorBudget, Mask, attention
from adaattn_core.backend import Capabilities
from adaattn_core.errors import UnsupportedError
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import Landmark, ScoreSkip
from adaattn_core.testing.oracles import exact_attention, row_quantile

LANDMARK = Landmark(tau=0.1, band=64, group=256, clusters=4, samples=32, tail=64, screen_rank=0)


def _tensors(
    *shape: int, heads_kv: int, len_kv: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    batch, _, _, dim = shape
    query = torch.randn(shape, dtype=dtype)
    key, value = (torch.randn(batch, heads_kv, len_kv, dim, dtype=dtype) for _ in range(2))
    return query, key, value


def test_the_conformance_kit(tmp_path: Path) -> None:
    """Every law that is not about a format or structure that it does not offer."""
    plugin = ["-p", "adaattn_core.testing.pytest_plugin", "--adaattn-profile", "ci"]
    laws = ["--pyargs", "adaattn_core.testing.conformance", "--adaattn-backend", "torch"]
    command = [sys.executable, "-m", "pytest", *plugin, *laws, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


# -- who is asked ------------------------------------------------------------------------------
def test_auto_asks_it_before_numpy() -> None:
    assert get_backend("auto", "cpu").name == "torch"
    q, k, v = _tensors(1, 2, 24, 16, heads_kv=2, len_kv=24)
    assert attention(q, k, v).provenance["backend"] == "torch"
    assert attention(*(x.numpy() for x in (q, k, v))).provenance["backend"] == "torch"


def test_auto_takes_the_first_that_runs_what_is_named() -> None:
    q, k, v = (x.numpy() for x in _tensors(1, 2, 24, 16, heads_kv=2, len_kv=24))
    policy = FixedPolicy(qk="i8", pv="f16")
    assert attention(q, k, v, policy=policy).provenance["backend"] == "numpy"
    problem = AttentionProblem.from_arrays(q, k, v)
    plan = Plan.uniform(problem, HeadPlan(structure=ScoreSkip()))
    assert attention(q, k, v, plan=plan).provenance["backend"] == "numpy"
    assert attention(q, k, v, target="sm90").provenance["backend"] == "numpy"
    with pytest.raises(UnsupportedError, match="score_skip"):
        attention(q, k, v, plan=plan, backend="torch")

    def nobody(can: Capabilities) -> bool:
        return False

    assert get_backend("auto", "cpu", nobody).name == "torch"


def test_the_manifest_does_not_import_pytorch() -> None:
    code = (
        "import sys, adaattn_torch.plugin as p; p.probe();"
        "sys.exit('torch' in sys.modules or 'adaattn_torch.functional' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- exact -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_exact_is_pytorchs_own_kernel(dtype: torch.dtype, causal: bool) -> None:
    """Without a budget the function returns what PyTorch's returns, bit for bit."""
    q, k, v = _tensors(2, 4, 300, 32, heads_kv=2, len_kv=300, dtype=dtype)
    ours = adaattn_torch.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True, strict=True
    )
    wide = q, k, v
    if dtype.itemsize == 2:  # multiplied in float32 and rounded once
        wide = q.float(), k.float(), v.float()
    theirs = F.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True)
    assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("len_q", [1, 7])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_cached_keys(len_q: int, order: str) -> None:
    """Fewer queries than keys, as a cache gives them, in either order of the query's axes."""
    q, k, v = _tensors(1, 6, len_q, 32, heads_kv=2, len_kv=90)
    if order == "bshd":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    forward = get_backend("torch").forward  # type: ignore[attr-defined]
    out, lse = forward(q, k, v, mask=Mask.causal("bottom_right"))
    problem = AttentionProblem.from_arrays(
        *(x.numpy() for x in (q, k, v)), mask=Mask.causal("bottom_right")
    )
    exact = exact_attention(problem)
    assert np.abs(out.numpy() - exact.out).max() < 1e-5
    assert np.abs(lse.numpy() - exact.lse).max() < 1e-5


def test_the_short_way_sees_what_may_not_be_multiplied() -> None:
    """Scores that overflow float32, all to -inf, are not taken for keys that nobody sees."""
    q, k, v = _tensors(1, 1, 8, 8, heads_kv=1, len_kv=8)
    big = 1e25 * torch.ones_like(q), -1e25 * torch.ones_like(k)
    forward = get_backend("torch").forward  # type: ignore[attr-defined]
    out, lse = forward(*big, v)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    assert torch.allclose(out, v.mean(dim=2, keepdim=True).expand_as(out), atol=1e-6)


def test_float32_means_float32() -> None:
    """Where PyTorch may round operands of float32 products, float64 does the work."""
    q, k, v = _tensors(1, 2, 300, 64, heads_kv=2, len_kv=300)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.set_float32_matmul_precision("medium")
    try:
        out = adaattn_torch.scaled_dot_product_attention(q, k, v, strict=True)
        result = attention(q, k, v, backend="torch")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(out, exact)
    assert torch.equal(result.out, exact)


def test_provenance_names_the_kernel() -> None:
    q, k, v = _tensors(1, 2, 24, 16, heads_kv=2, len_kv=24)
    said = attention(q, k, v, backend="torch").provenance
    assert "flash_attention_for_cpu" in said["kernels"]
    assert said["torch"] == torch.__version__


# -- landmarks ---------------------------------------------------------------------------------
def _clustered(seed: int, len_q: int = 1024) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((16, 32)) * 2
    key = centres[rng.integers(0, 16, len_q)] + 0.3 * rng.standard_normal((len_q, 32))
    query = centres[rng.integers(0, 16, (4, len_q))] + 0.3 * rng.standard_normal((4, len_q, 32))
    value = rng.standard_normal((2, len_q, 32))
    keys = np.stack([key, key[::-1]])
    query, keys, value = (x[None].astype(np.float32) for x in (query, keys, value))
    return query, keys, value


@pytest.mark.parametrize("mask", [Mask.causal(), Mask.none()], ids=["causal", "full"])
@pytest.mark.parametrize(("screen_rank", "fitted"), [(0, True), (8, True), (0, False)], ids=str)
def test_numpy_and_torch_agree(mask: Mask, screen_rank: int, fitted: bool) -> None:
    """The same plan and seed: both certificates hold, and the outputs lie within both."""
    q, k, v = _clustered(1)
    problem = AttentionProblem.from_arrays(q, k, v, mask=mask)
    structure = Landmark(
        tau=0.1, band=64, group=256, clusters=4, samples=32, tail=64,
        screen_rank=screen_rank, fitted=fitted,
    )  # fmt: skip
    plan = Plan.uniform(problem, HeadPlan(structure=structure), seed=3)
    budget = ErrorBudget(1.0, rows=0.95, on_violation="report")
    mine, theirs = (
        attention(q, k, v, mask=mask, plan=plan, budget=budget, seed=5, backend=name)
        for name in ("torch", "numpy")
    )
    exact = exact_attention(problem).out
    for head in range(4):
        outs = [np.asarray(r.out)[0, head].astype(np.float64) for r in (mine, theirs)]
        certified = [
            r.certificate[0, head].upper * r.facts[0, head].output_rms for r in (mine, theirs)
        ]
        apart = np.linalg.norm(outs[0] - outs[1], axis=1)
        assert np.quantile(apart, 0.9) <= sum(certified)
        share = [r.facts[0, head].share for r in (mine, theirs)]
        assert share[0] == pytest.approx(share[1], rel=0.25)
        errors = [row_quantile(out, exact[0, head], 0.95) for out in outs]
        assert errors[0] <= 2 * errors[1] + 0.01


def test_certificates_cover_two_hundred_heads() -> None:
    """At confidence 0.95 at least 95% of the certificates of 200 landmark heads hold."""
    held = total = 0
    for seed in range(50):
        q, k, v = _clustered(100 + seed, 512)
        problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
        plan = Plan.uniform(problem, HeadPlan(structure=LANDMARK), seed=seed)
        budget = ErrorBudget(1.0, on_violation="report")
        result = attention(
            q, k, v, mask=Mask.causal(), plan=plan, budget=budget, seed=seed, backend="torch"
        )
        exact = exact_attention(problem).out
        for head in range(4):
            out = result.out[0, head].astype(np.float64)
            truth = row_quantile(out, exact[0, head], 0.95)
            held += truth <= result.certificate[0, head].upper
            total += 1
    assert total == 200
    assert held >= 0.95 * total


def test_explain_says_what_is_not_offered() -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 16)
    plan = attention(q, k, v, mask=Mask.causal(), budget=0.1, backend="torch").plan
    assert "dense: nothing cheaper keeps the budget; not offered here: score_skip" in str(
        plan.explain()
    )
    here = attention(q.numpy(), k.numpy(), v.numpy(), budget=0.1, backend="numpy").plan
    assert "not offered" not in str(here.explain())


@pytest.mark.filterwarnings("error")
def test_rows_that_are_not_finite_are_compared_without_a_warning() -> None:
    q, k, v = torch.randn(3, 1, 1, 64, 16)
    problem = AttentionProblem.from_arrays(q, k, v, mask=Mask.causal())
    backend = get_backend("torch", "cpu")
    raw = backend.run(problem, Plan.uniform(problem, HeadPlan()))
    raw.out[0, 0, ::2] = torch.inf
    found = backend.row_errors(problem, raw, {(0, 0): np.arange(64)}, enough=0.1)[0, 0]
    assert np.isinf(found.error[::2]).all()
    assert (found.error[1::2] < 1e-5).all()


def test_a_budget_is_kept_whatever_it_costs_to_measure() -> None:
    """Whether landmarks pay at this size or not."""
    q, k, v = _clustered(7, 2048)
    result = attention(q, k, v, mask=Mask.causal(), budget=0.1, seed=2, backend="torch")
    assert (result.certificate.upper <= 0.1).all()


def test_gradients_and_autocast_go_on_as_before() -> None:
    q, k, v = _tensors(1, 2, 40, 16, heads_kv=2, len_kv=40)
    q.requires_grad_()
    out = adaattn_torch.scaled_dot_product_attention(q, k, v, is_causal=True, budget=0.1)
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert adaattn_torch.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    with torch.inference_mode():
        assert adaattn_torch.scaled_dot_product_attention(q, k, v, budget=0.2).shape == q.shape
