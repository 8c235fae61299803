"""What certificates say of 8-bit operands bounds what the quantiser did to them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.formats import SCALE_BLOCKS
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.kernels.smxx_quantize import Codes
from adaattn_cuda.quantised import (
    VALUE_STEP,
    QuantisedRun,
    i8_norm,
    i8_residual,
    value_residual,
)
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import TILE_KEYS, TILE_SCALES
from adaattn_reference import quantise

LENGTH, DIM = 200, 16
PLACES = (0, TILE_KEYS)
SPANS = (SequenceSpan(0, 0, 0, 80, 0, 80), SequenceSpan(1, 0, 80, 200, 80, 200))


def largest_norm(x: Any) -> float:
    return float(np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=-1)).max())


@given(seed=st.integers(0, 99), size=st.sampled_from((1.0, 1e-20, 1e15)), odd=st.booleans())
def test_steps_bound_residuals_and_norms(seed: int, size: float, odd: bool) -> None:
    rng = np.random.default_rng(seed)
    query, key, value = (size * rng.standard_normal((3, LENGTH, DIM))).astype(np.float32)
    if odd:
        key[::17] *= 100
        value[:, 3] = 0
        query[5] = 0
    layout = Codes(1, 1, 1, LENGTH, 2 * TILE_KEYS, 64, 64, 2, True, True)
    offsets, total = layout.scales()
    memory = np.full(total, 255, np.uint8)  # NaN wherever nothing is written

    def part(name: str, *shape: int) -> NDArray[np.float32]:
        count = 4 * int(np.prod(shape))
        return memory[offsets[name] : offsets[name] + count].view(np.float32).reshape(shape)

    blocks, records = SCALE_BLOCKS["tile"], part("tile_scales", 2, TILE_SCALES)
    truth = []
    for span, place in zip(SPANS, PLACES, strict=True):
        rows = slice(span.kv_start, span.kv_stop)
        queries, query_steps = quantise.dequantised(
            query[rows], blocks.query_groups(span.len_q), "i8"
        )
        part("query_scales", LENGTH)[rows] = query_steps
        centre = quantise.centre(key[rows], np.ones(span.len_kv, bool))
        centred = key[rows] - centre
        groups = blocks.key_groups(span.len_kv)
        keys, key_steps = quantise.dequantised(centred, groups, "i8")
        values, value_steps = quantise.dequantised(
            value[rows], blocks.value_groups(span.len_kv), "e4m3"
        )
        records[place // TILE_KEYS, : len(key_steps)] = key_steps
        records[place // TILE_KEYS, VALUE_STEP] = value_steps[0]
        truth.append(
            (
                largest_norm(query[rows] - queries.astype(np.float64)),
                largest_norm(centred - keys.astype(np.float64)),
                largest_norm(centred),
                largest_norm(value[rows] - values.astype(np.float64)),
                largest_norm(value[rows]),
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            driver, "read", lambda address, count, device: ctypes.string_at(address, count)
        )
        run = QuantisedRun(layout, SPANS, PLACES, memory, memory.ctypes.data, total, 0)
        steps = run.steps()
    for number, (lost_query, lost_key, key_norm, lost_value, value_norm) in enumerate(truth):
        assert lost_query <= i8_residual(steps.query[number, 0], DIM)
        assert lost_key <= i8_residual(steps.key[number, 0], DIM)
        assert i8_residual(steps.key[number, 0], DIM) <= 20 * lost_key  # and says something
        assert key_norm <= i8_norm(steps.key[number, 0], DIM)
        assert lost_value <= value_residual(steps.value[number, 0], np.float64(value_norm), DIM)
