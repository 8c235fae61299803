"""Structures: what each one must still get right, and when it must equal dense."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark, LowRank, ScoreSkip, block_mask
from adaattn_core.testing.kit import Kit, assert_certificate_holds, assert_same_result
from adaattn_core.testing.oracles import exact_attention, row_errors
from adaattn_core.testing.strategies import MaskSpec, ProblemSpec

STRUCTURAL = st.sampled_from(
    (MaskSpec(), MaskSpec(window=(None, 0), alignment="top_left"), MaskSpec(lengths="lengths"))
)
VALUES = ("normal", "outliers", "needles", "constant")


@given(data=st.data(), lam=st.sampled_from((1e-8, 1e-5, 1e-3, 0.05, 0.5)))
def test_score_skip_keeps_its_theorem(kit: Kit, data: st.DataObject, lam: float) -> None:
    """Skipping tiles drops no more mass than the certificate says, for every input."""
    kit.require(structure="score_skip")
    structure = ScoreSkip(lam=lam, tile_q=16, tile_kv=16)
    plan = kit.head(structure=structure)
    spec = data.draw(kit.specs(plan, lengths=st.integers(0, 160)))
    result = kit.certify(spec.build(kit.home.send), plan)
    assert_certificate_holds(kit, result, spec.build())


def test_score_skip_skips_and_keeps_needles(kit: Kit) -> None:
    """Far tiles without weight are skipped, a needle far away is found."""
    kit.require(structure="score_skip")
    plan = kit.head(structure=ScoreSkip(lam=1e-6, tile_q=64, tile_kv=64))
    host = _banded_problem(kit.dtype(plan))
    result = kit.certify(kit.place(host), plan)
    assert result.facts[0, 0].share < 0.9
    assert_certificate_holds(kit, result, host)
    error = np.abs(kit.home.fetch(result.out).astype(np.float64) - exact_attention(host).out)
    assert error[0, 0, -1].max() < 0.05, "the last row looks at the first key"


def _banded_problem(dtype: str) -> AttentionProblem:
    """Let rows look at their own block of keys only, but the last row at the first key."""
    spec = ProblemSpec(len_q=512, len_kv=512, dim_qk=64, dim_v=64, dtype=dtype, seed=3)
    host = spec.build()
    block = np.arange(512) // 64
    host.key[...] = 0
    host.query[...] = 0
    host.key[0, 0, np.arange(512), block] = 8
    host.query[0, 0, np.arange(512), block] = 32
    host.key[0, 0, 0, 63] = 16
    host.query[0, 0, -1, :] = 0
    host.query[0, 0, -1, 63] = 32
    return host


@given(data=st.data(), share=st.floats(0.1, 1.0))
def test_low_rank_keeps_its_theorem(kit: Kit, data: st.DataObject, share: float) -> None:
    """The feature residual covers what a rank leaves out, for every input."""
    kit.require(structure="low_rank")
    spec = data.draw(kit.specs(kit.head(), values=VALUES))
    plan = kit.head(structure=LowRank(rank=max(1, round(share * spec.dim_qk))))
    result = kit.certify(spec.build(kit.home.send), plan)
    assert_certificate_holds(kit, result, spec.build())


@given(data=st.data())
def test_given_blocks_equal_a_boolean_mask(kit: Kit, data: st.DataObject) -> None:
    """Block-sparse with given blocks is attention over the keys of those blocks."""
    kit.require(structure="block_sparse")
    spec = data.draw(
        kit.specs(kit.head(), masks=STRUCTURAL, values=VALUES, lengths=st.integers(1, 200))
    )
    host = spec.build()
    rng = np.random.default_rng(spec.seed)
    tiles, blocks = -(-host.len_q // 32), -(-host.len_kv // 16)
    kept = rng.random((tiles, blocks)) < 0.6
    structure = BlockSparse(tile_q=32, tile_kv=16, group=32, blocks=block_mask(kept))
    allowed = np.repeat(np.repeat(kept, 32, axis=0), 16, axis=1)[: host.len_q, : host.len_kv]
    masked = AttentionProblem.from_arrays(
        host.query, host.key, host.value, mask=_and(host.mask, allowed), scale=host.scale
    )
    plan = kit.head(structure=structure)
    outcome = kit.run(spec.build(kit.home.send), plan)
    dense = kit.certify(kit.place(masked), kit.head())
    exact = exact_attention(masked)
    assert_certificate_holds(kit, dense, masked, exact)
    # No theorem speaks about dropped blocks; about the kept ones dense's own certificate does.
    for index in host.heads():
        upper = dense.certificate[index].upper
        if not np.isfinite(upper):
            continue
        where = (host.sequences[index[0]].batch, index[1])
        error = row_errors(outcome.out[where], exact.out[where]).max(initial=0.0)
        size = dense.facts[index].output_rms * (1 + 1e-4)
        assert error <= 2 * upper * size + exact.error_upper[index]


def _and(mask: Mask, allowed: NDArray[np.bool_]) -> Mask:
    return mask & Mask.boolean(allowed[None, None])


@pytest.mark.parametrize("kind", ["block_sparse", "landmark"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_band_over_everything_is_dense(kit: Kit, kind: str, causal: bool) -> None:
    """Where the near field covers every key, nothing is approximated."""
    kit.require(structure=kind, masks=("causal",) if causal else ())
    structure = (
        BlockSparse(tau=0.0, band=1024, tile_q=32, tile_kv=32, group=64)
        if kind == "block_sparse"
        else Landmark(band=1024, group=128, tile=64)
    )
    mask = MaskSpec(window=(None, 0), alignment="top_left") if causal else MaskSpec()
    spec = ProblemSpec(
        heads_kv=1,
        group=2,
        len_q=300,
        len_kv=300,
        dim_qk=64,
        dim_v=64,
        dtype=kit.dtype(kit.head()),
        mask=mask,
    )
    host, problem = spec.build(), spec.build(kit.home.send)
    dense = kit.certify(problem, kit.head())
    other = kit.certify(problem, kit.head(structure=kit.sized(structure)))
    assert all(f.share == 1 for f in other.facts.values())
    if all(c.upper < np.inf for c in other.certificate.heads.values()):
        assert_same_result(kit, dense, host, other, host)
    exact = exact_attention(host)
    error = np.abs(kit.home.fetch(other.out).astype(np.float64) - exact.out).max()
    usual = np.abs(kit.home.fetch(dense.out).astype(np.float64) - exact.out).max()
    assert error <= 4 * usual + 1e-6


@pytest.mark.parametrize("kind", ["block_sparse", "landmark"])
@pytest.mark.parametrize("causal", [True, False])
def test_no_theorem_is_claimed_for_what_was_left_out(kit: Kit, kind: str, causal: bool) -> None:
    """Chosen blocks and pooled columns certify by sampling only: their worst case is inf."""
    kit.require(structure=kind, masks=("causal",) if causal else ())
    structure = (
        BlockSparse(tau=0.2, band=0, tile_q=64, tile_kv=64, group=64)
        if kind == "block_sparse"
        else Landmark(band=64, group=256, tau=0.2)
    )
    mask = MaskSpec(window=(None, 0), alignment="top_left") if causal else MaskSpec()
    spec = ProblemSpec(
        len_q=1024,
        len_kv=1024,
        dim_qk=64,
        dim_v=64,
        values="needles",
        dtype=kit.dtype(kit.head()),
        mask=mask,
    )
    plan = kit.head(structure=kit.sized(structure))
    result = kit.certify(spec.build(kit.home.send), plan)
    certificate, share = result.certificate[0, 0], result.facts[0, 0].share
    assert certificate.upper == np.inf or share == 1
    assert_certificate_holds(kit, result, spec.build())
    assert np.isfinite(kit.home.fetch(result.out)).all()
    assert isinstance(result.plan[0, 0], HeadPlan)
