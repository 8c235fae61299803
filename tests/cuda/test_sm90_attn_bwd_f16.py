"""Hopper's backward pass, as far as it can be looked at without a GPU."""

from __future__ import annotations

import ctypes
import random

import pytest

from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.kernels import sm90_attn_bwd_f16 as sm90
from adaattn_cuda.kernels.backward_task import BackwardTask
from adaattn_cuda.work.geometry import UNLIMITED

KEYS = 128


def walk(queries: int, block: int, *given: int) -> tuple[int, int, int, range]:
    """Return what key_work computes on the device: the tiles [begin, end) of a block of keys,
    where its first key's queries start, and the tiles that no mask is applied to.
    """
    len_q, len_kv, left, right, shift = given
    first = block * KEYS
    last = min(KEYS, len_kv - first) - 1
    start, stop = first + shift - right, first + shift + left + 1
    begin = max(0, start)
    end = min(len_q, stop + last)
    tile = begin // queries
    whole = range(-(-max(0, start + last) // queries), min(len_q, stop) // queries)
    if last + 1 < KEYS:
        whole = range(0)
    return tile, -(-end // queries) if end > begin else tile, start, whole


def task(dtype: str = "bf16", dim: int = 64, **more: object) -> BackwardTask:
    rows = contiguous(1 << 20, (2, 4, 100, dim), dtype, 0)
    lse = contiguous(1 << 20, (2, 4, 100), "f32", 0)
    spans = tuple(SequenceSpan(b, b, 0, 100, 0, 100) for b in range(2))
    given = {
        "query": rows, "key": rows, "value": rows, "out": rows, "lse": lse, "grad_out": rows,
        "allowed": None, "bias": None, "d_bias": None, "sequences": spans, "left": None,
        "right": None, "bottom_right": False, "scale": 1.0, "deterministic": False,
    }  # fmt: skip
    return BackwardTask(**{**given, **more})  # type: ignore[arg-type]


def test_parameters_are_as_large_as_the_kernel_says() -> None:
    assert ctypes.sizeof(sm90.Params) == 3776
    assert ctypes.sizeof(sm90.FinishParams) == 48


def test_what_it_takes_and_why_not() -> None:
    assert sm90.refusal(task(), "sm_90a") is None
    assert sm90.refusal(task(dim=128, deterministic=True), "sm_90a") is None
    mask = ArrayView(0, (2, 4, 100, 100), (0, 0, 100, 1), "bool", 0)
    for given, arch, why in (
        (task(), "sm_80", "architecture"),
        (task("f32"), "sm_90a", "f32"),
        (task(dim=192), "sm_90a", "above 128"),
        (task(softcap=5.0), "sm_90a", "softcap"),
        (task(dim=60), "sm_90a", "multiple of 8"),
        (task(allowed=mask), "sm_90a", "array"),
    ):
        assert why in (sm90.refusal(given, arch) or "")


def test_the_parts_of_the_workspace_do_not_overlap() -> None:
    for deterministic in (False, True):
        parts = sm90.workspace_parts(task(deterministic=deterministic), 64)
        end = 0
        for offset, size in parts.values():
            assert offset >= end
            assert offset % 16 == 0
            end = offset + size
        # What is zeroed before a pass comes first, in one piece.
        assert list(parts)[:3] == ["sums", "turns", "broken"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("queries", [64, 128])
def test_turns_count_the_later_blocks_that_add_to_a_tile(seed: int, queries: int) -> None:
    """A block that waited for one too many would wait for ever.

    `walk` and `later` are what key_work and wait_turn compute on the device. Nor may a tile go
    without its mask.
    """
    rng = random.Random(seed)
    for _ in range(400):
        len_q, len_kv = rng.randint(1, 1500), rng.randint(1, 1500)
        left = rng.choice([UNLIMITED, rng.randint(0, 600)])
        right = rng.choice([UNLIMITED, 0, rng.randint(0, 600)])
        shift = len_q - len_kv if rng.random() < 0.5 else 0
        blocks = -(-len_kv // KEYS)
        walks = [walk(queries, b, len_q, len_kv, left, right, shift) for b in range(blocks)]
        for block, (begin, end, start, whole) in enumerate(walks):
            for tile in whole:  # every query of it exists and sees every key of the block
                first, last = block * KEYS, block * KEYS + KEYS - 1
                assert (tile + 1) * queries <= len_q
                assert tile * queries >= last + shift - right
                assert (tile + 1) * queries - 1 <= first + shift + left
            for tile in range(begin, end):
                room = min((tile + 1) * queries, len_q) - 1 - start
                later = 0 if room < 0 else min(room // KEYS, blocks - 1 - block)
                after = walks[block + 1 :]
                assert later == sum(first <= tile < last for first, last, *_ in after)
