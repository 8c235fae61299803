"""Which keys and rows an array mask leaves visible: the kernel's own source, run on a CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sm80_on_cpu import describe

import adaattn_kernels_cu as kernels
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.hostile.definition import MaskFacts, spans, visibility
from adaattn_cuda.device.views import broadcast
from adaattn_cuda.kernels.smxx_mask_seen import packed

HEADS, HEADS_KV = 4, 2
POISON = 7


@pytest.fixture(scope="module")
def unit(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel compiled for the CPU."""
    emulation = Path(__file__).parent / "emulation"
    built = tmp_path_factory.mktemp("seen") / "seen.so"
    paths = ["-I", str(emulation), "-I", str(kernels.root())]
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    source = str(emulation / "seen_unit.cpp")
    subprocess.run([cxx, *flags, *paths, source, "-o", str(built)], check=True, timeout=120)
    return ctypes.CDLL(str(built))


MASKS = {
    "none": Mask.none(),
    "causal": Mask.causal("bottom_right"),
    "window": Mask.sliding_window(9, 2, "top_left"),
    "lengths": Mask.key_lengths([40, 75]) & Mask.causal("top_left"),
}


@given(
    name=st.sampled_from(sorted(MASKS)),
    kinds=st.sampled_from((("allowed",), ("bias",), ("allowed", "bias"))),
    axes=st.tuples(*[st.booleans()] * 4),
    share=st.sampled_from((0.0, 0.02, 0.5, 0.98)),
    seed=st.integers(0, 1000),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_it_finds_what_the_definition_says(
    unit: ctypes.CDLL,
    name: str,
    kinds: tuple[str, ...],
    axes: tuple[bool, ...],
    share: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    len_q, len_kv = (int(n) for n in rng.integers(1, (90, 80)))
    full = 2, HEADS, len_q, len_kv
    shape = tuple(n if kept else 1 for n, kept in zip(full, axes, strict=True))
    mask = MASKS[name]
    if mask.lengths is not None:
        mask = Mask.key_lengths([min(n, len_kv) for n in mask.lengths]) & Mask.causal(
            "top_left"
        )
    if "allowed" in kinds:
        mask = mask & Mask.boolean(rng.random(shape) < share)
    if "bias" in kinds:
        bias = rng.standard_normal(shape).astype(np.float32)
        bias[rng.random(shape) >= share] = -np.inf
        mask = mask & Mask.additive(bias)
    q, kv = (
        np.zeros((2, h, n, 8), np.float32) for h, n in ((HEADS, len_q), (HEADS_KV, len_kv))
    )
    problem = AttentionProblem.from_arrays(q, kv, kv, mask=mask)
    views = [
        None if x is None else broadcast(describe(x), full) for x in (mask.allowed, mask.bias)
    ]
    keys = np.full((2, HEADS_KV, len_kv), POISON, np.uint8)
    rows = np.full((2, HEADS, len_q), POISON, np.uint8)
    whole = mask.lengths is None
    for span in [None] if whole else problem.sequences:
        params, grid = packed(problem, span, *views)
        assert unit.params_bytes() == ctypes.sizeof(params)
        params.allowed, params.bias = (0 if v is None else v.pointer for v in views)
        params.keys, params.rows = keys.ctypes.data, rows.ctypes.data
        unit.run(ctypes.byref(params), grid)
    facts = MaskFacts.of(mask)
    for s in spans(facts, 2, len_q, len_kv):
        for head_kv in range(HEADS_KV):
            group = [2 * head_kv, 2 * head_kv + 1]
            sees = np.stack([visibility(facts, s, head, full) for head in group])
            found = keys[s.batch, head_kv, s.k0 : s.k1]
            np.testing.assert_array_equal(found, sees.any(axis=(0, 1)))
            np.testing.assert_array_equal(rows[s.batch, group], sees.any(axis=-1))
