"""The sm80 kernel's own source over tables of items, run on a CPU: given blocks, every mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sm80_on_cpu import UNIT, Emulator, assert_close, problem

from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.oracles import exact_attention
from adaattn_cuda.kernels.task import BlockHeads


def check(
    emulator: Emulator,
    p: AttentionProblem,
    qk: str,
    share: float = 0.5,
    tile_q: int = 64,
    tile_kv: int = 32,
    **choices: object,
) -> None:
    """Hold the kernel to exact attention under the blocks as a boolean mask."""
    rng = np.random.default_rng(3)
    longest = max(s.len_q for s in p.sequences), max(s.len_kv for s in p.sequences)
    if p.mask.cu_seqlens_kv is None:
        longest = longest[0], p.len_kv
    shape = (len(p.sequences), p.heads_q, -(-longest[0] // tile_q), -(-longest[1] // tile_kv))
    kept = rng.random(shape) < share
    kept[:, 0, 0] = False  # a tile of rows that see nothing
    plan = Plan.block_sparse(p, kept, tile_q=tile_q, tile_kv=tile_kv)
    blocks = BlockHeads({i: h.structure for i, h in plan.heads.items()})  # type: ignore[misc]
    out, lse, heads = emulator.run_listed(p, blocks, qk, qk, **choices)  # type: ignore[arg-type]
    allowed = np.zeros((p.batch, p.heads_q, p.len_q, p.len_kv), bool)
    whole = kept.repeat(tile_q, 2).repeat(tile_kv, 3)
    for span in p.sequences:
        rows, keys = slice(span.q_start, span.q_stop), slice(span.kv_start, span.kv_stop)
        allowed[span.batch, :, rows, keys] = whole[span.index, :, : span.len_q, : span.len_kv]
    if p.mask.allowed is not None:
        allowed &= p.mask.allowed
    mask = replace(p.mask, allowed=allowed)
    masked = AttentionProblem.from_arrays(p.query, p.key, p.value, mask=mask, scale=p.scale)
    exact = exact_attention(masked)
    assert_close(out, exact.out, 2 * UNIT[qk] + UNIT[p.dtype])
    reached = np.isfinite(exact.lse)
    np.testing.assert_array_equal(np.isfinite(lse), reached)
    np.testing.assert_array_equal(lse[~reached], exact.lse[~reached])
    assert 0 < heads.kept(next(iter(blocks.of))).share < 1


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("arch", ["sm_90a", "sm_86"])
def test_formats(emulator: Emulator, dtype: str, arch: str) -> None:
    check(emulator, problem(dtype, (200, 300), heads=(2, 1)), dtype, arch=arch)


@pytest.mark.parametrize("dims", [(128, 128), (96, 160), (40, 40), (37, 51)])
def test_dims(emulator: Emulator, dims: tuple[int, int]) -> None:
    check(emulator, problem("bf16", (100, 250), dims, heads=(2, 2)), "bf16")


MASKS = {
    "causal top left": (Mask.causal("top_left"), (250, 170)),
    "causal bottom right": (Mask.causal("bottom_right"), (140, 300)),
    "causal, first rows see nothing": (Mask.causal("bottom_right"), (250, 90)),
    "window": (Mask.sliding_window(40, 20, "bottom_right"), (255, 191)),
    "lengths": (Mask.key_lengths([70]), (200, 190)),
    "ragged": (
        Mask.ragged([0, 130, 130, 200], [0, 120, 150, 290]) & Mask.causal("bottom_right"),
        (200, 290),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_interval_masks(emulator: Emulator, name: str) -> None:
    mask, lens = MASKS[name]
    check(emulator, problem("bf16", lens, heads=(2, 1), mask=mask), "bf16")


@pytest.mark.parametrize("sizes", [(128, 64), (16, 16), (100, 24), (256, 128)])
def test_block_sizes(emulator: Emulator, sizes: tuple[int, int]) -> None:
    p = problem("bf16", (300, 400), heads=(2, 2), mask=Mask.causal("bottom_right"))
    check(emulator, p, "bf16", tile_q=sizes[0], tile_kv=sizes[1])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_array_masks(emulator: Emulator, dtype: str) -> None:
    rng = np.random.default_rng(1)
    allowed = rng.random((1, 2, 140, 170)) < 0.3
    check(emulator, problem(dtype, (140, 170), heads=(2, 2), mask=Mask.boolean(allowed)), dtype)
    bias = rng.standard_normal((2, 1, 1, 170)).astype(np.float32)
    bias[..., :5] = -np.inf
    mask = Mask.additive(bias) & Mask.causal("top_left")
    check(emulator, problem(dtype, (140, 170), heads=(2, 1), batch=2, mask=mask), dtype)


def test_nonfinite_keys_and_values_stay_in_their_blocks(emulator: Emulator) -> None:
    """Rows whose blocks do not hold a NaN do not see it, and those that do become NaN."""
    p = problem("bf16", (200, 300), heads=(2, 1))
    p.value[0, 0, 290, 3], p.key[0, 0, 20, 1] = np.nan, np.nan
    kept = np.zeros((2, 4, 10), bool)
    kept[:, :, 3:6] = True
    kept[0, 1, 0] = kept[1, 2, 9] = True
    plan = Plan.block_sparse(p, kept[None], tile_q=64, tile_kv=32)
    blocks = BlockHeads({i: h.structure for i, h in plan.heads.items()})  # type: ignore[misc]
    out, _, _ = emulator.run_listed(p, blocks, "bf16", "bf16")
    lost = ~np.isfinite(out.astype(np.float32)).all(axis=-1)[0]
    expected = np.zeros_like(lost)
    expected[0, 64:128] = expected[1, 128:192] = True
    np.testing.assert_array_equal(lost, expected)
