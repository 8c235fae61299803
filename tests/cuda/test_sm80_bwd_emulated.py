"""The backward kernels' own source on a CPU: layouts, masks, groups, rows that see nothing.

Only the instruction header is replaced, as in test_sm80_emulated.py. Tolerances are a few
roundings of the operands and of the gradients, against exact gradients in float64.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import adaattn_kernels_cu as kernels
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.gradients import exact_gradients, naive_gradients
from adaattn_core.testing.oracles import exact_attention
from adaattn_cuda.device.views import ArrayView, broadcast
from adaattn_cuda.jit.spec import KernelSpec, cpp
from adaattn_cuda.kernels import sm80_attn_bwd as bwd
from adaattn_cuda.kernels import smxx_attn_bwd_rows as rows
from adaattn_cuda.kernels.backward_task import POINTERS, BackwardTask
from adaattn_cuda.tuning import sm80_attn_bwd as tuning

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype("f2"), "f32": np.dtype("f4")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(bool): "bool"}
FLOOR = {"bf16": 2.0**-9, "f16": 2.0**-12, "f32": 2.0**-20}
_UNIT = """\
#include "cpu.h"
#include "{header}"

using Traits = {traits};
static_assert(Traits::kSmemBytes == {smem_bytes}, "host and kernel disagree on smem");

namespace {{
adaattn::{stem}::Params shared_params;
}}

extern "C" int params_bytes() {{ return sizeof(adaattn::{stem}::Params); }}
extern "C" void run(const adaattn::{stem}::Params* params, int blocks) {{
    shared_params = *params;
    for (int block = 0; block < blocks; ++block) {{
        adaattn::ptx::emulation::run_block(block, Traits::kThreads, Traits::kSmemBytes,
            [] {{ adaattn::{stem}::run<Traits>(shared_params); }});
    }}
}}
"""


def traits_of(spec: KernelSpec) -> str:
    """C++ text of a specialisation's traits, as `adaattn_cuda.jit.codegen` writes it."""
    plain = f"adaattn::{spec.stem}::Traits<{', '.join(cpp(t) for t in spec.traits)}>"
    return f"adaattn::softmax::Ruled<{plain}, {spec.rule}>" if spec.rule else plain


class Emulator:
    """The kernels compiled for the CPU, one library per specialisation, kept in a folder."""

    def __init__(self, cxx: str, folder: Path) -> None:
        self._cxx, self._folder = cxx, folder

    def library(self, spec: KernelSpec) -> ctypes.CDLL:
        """Compile one specialisation, once."""
        unit = _UNIT.format(
            header=spec.header, stem=spec.stem, smem_bytes=spec.smem_bytes,
            traits=traits_of(spec),
        )  # fmt: skip
        stem = self._folder / hashlib.sha256(unit.encode()).hexdigest()[:16]
        built, source = stem.with_suffix(".so"), stem.with_suffix(".cpp")
        if not built.exists():
            source.write_text(unit)
            paths = ["-I", str(Path(__file__).parent / "emulation"), "-I", str(kernels.root())]
            warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *warnings]
            command = [self._cxx, *flags, *paths, str(source), "-o", str(built)]
            subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(built))

    def run(
        self,
        problem: AttentionProblem,
        grad_out: NDArray[Any],
        grad_lse: Any = None,
        most_blocks: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Gradients, from the exact output in the problem's dtype; poisoned where unwritten."""
        shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
        mask, exact = problem.mask, exact_attention(problem)
        out, lse = aligned(exact.out.astype(problem.query.dtype)), exact.lse.astype("f4")
        found = {
            f"d_{name}": np.full(getattr(problem, name).shape, 7, problem.query.dtype)
            for name in ("query", "key", "value")
        }
        masks = [x if x is None else broadcast(describe(x), shape)
                 for x in (mask.allowed, mask.bias)]  # fmt: skip
        d_bias = None if mask.bias is None else np.zeros(mask.bias.shape, "f4")
        masks.append(None if d_bias is None else broadcast(describe(d_bias), shape))
        arrays = (problem.query, problem.key, problem.value, out, lse, grad_out)
        views = tuple(map(describe, arrays))
        sinks = None if problem.sinks is None else describe(problem.sinks)
        if problem.softcap is not None:
            d_bias, masks[2] = None, None  # not offered together
        task = BackwardTask.of(problem, views, tuple(masks), False, sinks)
        bwd.refuse(task)
        workspace = aligned(np.full(bwd.workspace_bytes(task) // 4, 7, "f4"))
        if not task.is_uniform:
            for x in found.values():
                x[...] = 0
        named = dict.fromkeys(POINTERS, 0)
        named |= dict(zip(POINTERS, (v.pointer for v in views), strict=False))
        named |= {name: x.ctypes.data for name, x in found.items()}
        named |= dict(zip(("allowed", "bias", "d_bias"),
                          (x.pointer if x else 0 for x in masks), strict=True))  # fmt: skip
        named["rows"] = workspace.ctypes.data
        named["grad_lse"] = 0 if grad_lse is None else grad_lse.ctypes.data
        if sinks is not None:
            found["d_sinks"] = np.full(problem.heads_q, 7, "f4")
            named |= {"sinks": sinks.pointer, "d_sinks": found["d_sinks"].ctypes.data}
        unit = 1.0 if task.allowed or task.bias else 1.0 / (task.softcap or task.scale)
        before = rows.pack(task, unit)
        rows.place(before, named)
        vectorised = rows.is_vectorised(task.out, task.grad_out)
        library = self.library(tuning.rows_spec(task.query.dtype, vectorised, "sm_80"))
        assert library.params_bytes() == ctypes.sizeof(rows.Params)
        library.run(ctypes.byref(before), rows.blocks(task))
        for part in bwd.passes(task, "sm_80", most_blocks):
            library = self.library(part.chosen.spec("sm_80"))
            assert library.params_bytes() == ctypes.sizeof(bwd.Params)
            bwd.place(part, named)
            library.run(ctypes.byref(part.params), part.blocks)
        if sinks is not None:
            of_sinks = bwd.sinks.pack(task, unit)
            bwd.sinks.place(of_sinks, named)
            library = self.library(bwd.sinks.spec("sm_80"))
            assert library.params_bytes() == ctypes.sizeof(bwd.sinks.Params)
            library.run(ctypes.byref(of_sinks), problem.heads_q)
        return found | ({} if d_bias is None else {"d_bias": d_bias})


def describe(x: NDArray[Any]) -> ArrayView:
    """View of a host array, as the kernel sees a device one."""
    strides = tuple(s // x.dtype.itemsize for s in x.strides)
    return ArrayView(x.ctypes.data, x.shape, strides, _NAMES[x.dtype], -1)


def aligned(x: NDArray[Any]) -> NDArray[Any]:
    """Copy that begins on a 16-byte boundary."""
    room = np.zeros(x.nbytes + 16, np.uint8)
    first = -room.ctypes.data % 16
    copy = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


@pytest.fixture(scope="session")
def emulator(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(cxx, tmp_path_factory.mktemp("emulated-backward"))


def problem(
    dtype: str,
    lens: tuple[int, int],
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    mask: Mask | None = None,
    sinks: Any = None,
    softcap: float | None = None,
) -> tuple[AttentionProblem, NDArray[Any]]:
    """Return a random problem and a gradient of its output."""
    rng = np.random.default_rng(0)
    shapes = (
        (batch, heads[0], lens[0], dims[0]),
        (batch, heads[1], lens[1], dims[0]),
        (batch, heads[1], lens[1], dims[1]),
        (batch, heads[0], lens[0], dims[1]),
    )
    arrays = [aligned(rng.standard_normal(s).astype(DTYPES[dtype])) for s in shapes]
    rules = {"sinks": sinks, "softcap": softcap}
    return AttentionProblem.from_arrays(*arrays[:3], mask=mask, **rules), arrays[3]


def check(
    emulator: Emulator, p: AttentionProblem, grad_out: NDArray[Any], grad_lse: Any = None
) -> None:
    """At most twice the error of the naive computation in the same format."""
    found = emulator.run(p, grad_out, grad_lse)
    truth = exact_gradients(p, grad_out, grad_lse)
    usual = naive_gradients(p, grad_out, grad_lse, multiply=p.dtype)
    for name, got in found.items():
        exact, naive = (getattr(x, name[2:]) for x in (truth, usual))
        assert_close(got, exact, naive, FLOOR[p.dtype], name)


def assert_close(got: Any, exact: Any, naive: Any, floor: float, name: str = "") -> None:
    got, size = got.astype(np.float64), np.linalg.norm(exact)
    assert np.isfinite(got).all(), name
    error, known = np.linalg.norm(got - exact), np.linalg.norm(naive - exact)
    assert error <= 2 * known + floor * size, (name, error / size, known / size)


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        ("bf16", (64, 64)),
        ("f32", (32, 64)),
        ("bf16", (128, 128)),
        ("bf16", (96, 32)),
        ("bf16", (256, 256)),
        ("bf16", (37, 51)),
    ],
)
def test_formats_and_dims(emulator: Emulator, dtype: str, dims: tuple[int, int]) -> None:
    check(emulator, *problem(dtype, (40, 150), dims))


MASKS = {
    "causal top left": (Mask.causal("top_left"), (150, 70)),
    "causal bottom right": (Mask.causal("bottom_right"), (140, 200)),
    "causal, first rows see nothing": (Mask.causal("bottom_right"), (150, 9)),
    "window": (Mask.sliding_window(40, 20, "bottom_right"), (255, 191)),
    "window, one side": (Mask.sliding_window(None, 3, "top_left"), (70, 300)),
    "no key at all": (Mask.key_lengths([0]), (20, 70)),
}


@pytest.mark.parametrize("name", MASKS)
def test_interval_masks(emulator: Emulator, name: str) -> None:
    mask, lens = MASKS[name]
    check(emulator, *problem("bf16", lens, mask=mask))


def test_groups_lengths_batches_and_the_lse(emulator: Emulator) -> None:
    mask = Mask.key_lengths([70, 0, 33]) & Mask.causal("bottom_right")
    p, grad = problem("bf16", (60, 70), heads=(4, 2), batch=3, mask=mask)
    check(emulator, p, grad)
    grad_lse = np.random.default_rng(1).standard_normal((3, 4, 60)).astype("f4")
    check(emulator, p, grad, grad_lse)


def test_ragged(emulator: Emulator) -> None:
    mask = Mask.ragged([0, 30, 30, 100], [0, 20, 50, 90]) & Mask.sliding_window(
        5, 2, "bottom_right"
    )
    check(emulator, *problem("bf16", (100, 90), heads=(2, 1), mask=mask))


def test_more_sequences_than_one_launch_takes(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bwd, "MAX_UNITS", 3)
    cu = [0, 2, 9, 9, 30, 31, 40]
    check(emulator, *problem("bf16", (cu[-1], cu[-1]), (32, 32), mask=Mask.ragged(cu, cu)))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_array_masks(emulator: Emulator, dtype: str) -> None:
    rng = np.random.default_rng(1)
    allowed = rng.random((1, 2, 40, 70)) < 0.3
    allowed[0, 0, 3] = False
    check(emulator, *problem(dtype, (40, 70), heads=(2, 2), mask=Mask.boolean(allowed)))
    bias = rng.standard_normal((2, 1, 1, 70)).astype(np.float32)
    bias[..., :5] = -np.inf
    mask = Mask.additive(bias) & Mask.causal("top_left")
    check(emulator, *problem(dtype, (40, 70), heads=(2, 1), batch=2, mask=mask))
    full = rng.standard_normal((1, 2, 40, 70)).astype(DTYPES[dtype])
    both = Mask.additive(full) & Mask.boolean(allowed)
    check(emulator, *problem(dtype, (40, 70), heads=(2, 1), mask=both))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_rows_of_the_lowest_finite_number(emulator: Emulator, dtype: str) -> None:
    """Their lse cannot hold the logarithm of their sum: they weigh their values alike."""
    bias = np.zeros((1, 1, 40, 70), np.float32)
    bias[..., 3, :] = bias[..., 20:, 50:] = -3.4028235e38
    bias[..., 7, :] = -1e6
    check(emulator, *problem(dtype, (40, 70), heads=(2, 1), mask=Mask.additive(bias)))


def test_scores_of_thousands(emulator: Emulator) -> None:
    p, grad = problem("f32", (40, 70))
    huge = AttentionProblem.from_arrays(
        aligned(p.query * np.float32(300)), aligned(p.key * np.float32(30)), p.value
    )
    found, truth = emulator.run(huge, grad), exact_gradients(huge, grad)
    # Scores of 1e5 are off by 1e-2 in float32: nearly one-hot rows hold that off their values.
    assert_close(found["d_value"], truth.value, truth.value, 2.0**-10)


@pytest.mark.parametrize("masked", ["lengths", "boolean"])
def test_nothing_leaks_from_masked_keys_and_blind_rows(emulator: Emulator, masked: str) -> None:
    allowed = np.ones((1, 1, 50, 90), bool)
    allowed[..., 60:] = False
    allowed[..., 4, :] = masked == "lengths"
    mask = Mask.key_lengths([60]) if masked == "lengths" else Mask.boolean(allowed)
    p, grad = problem("bf16", (50, 90), mask=mask)
    p.value[:, :, 60:], p.key[:, :, 60:] = np.nan, np.inf
    if masked == "boolean":
        p.query[0, 0, 4] = grad[0, 0, 4] = np.nan
    check(emulator, p, grad)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_sinks(emulator: Emulator, dtype: str) -> None:
    """Rows of which nothing but a sink is left, and sinks that dwarf the keys."""
    sinks = np.array([0.5, -np.inf, 12.0, -3.0], np.float32)
    mask = Mask.causal("bottom_right") & Mask.key_lengths([50, 9])
    p, grad = problem(dtype, (60, 70), (32, 32), (4, 2), 2, mask, sinks)
    grad_lse = np.random.default_rng(1).standard_normal((2, 4, 60)).astype("f4")
    check(emulator, p, grad)
    grad[1, :, :30] = np.nan  # rows that see nothing
    p.query[1, :, :30] = np.nan
    check(emulator, p, grad, grad_lse)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_softcap(emulator: Emulator, dtype: str) -> None:
    """Alone, with sinks, ahead of an additive mask with a row of the lowest finite number."""
    mask = Mask.causal("bottom_right") & Mask.key_lengths([50, 9])
    sinks = np.array([0.5, -np.inf, 12.0, -3.0], np.float32)
    check(emulator, *problem(dtype, (60, 70), (32, 32), (4, 2), 2, mask, softcap=0.7))
    check(emulator, *problem(dtype, (60, 70), (32, 32), (4, 2), 2, mask, sinks, 1.5))
    bias = np.random.default_rng(3).standard_normal((1, 1, 40, 70)).astype(np.float32)
    bias[..., 3, :] = -3.4028235e38
    given = {"mask": Mask.additive(bias), "softcap": 1.5}
    check(emulator, *problem(dtype, (40, 70), (32, 32), (2, 1), **given))


def test_sinks_next_to_scores_of_thousands(emulator: Emulator) -> None:
    """Such an lse has no digits left for a sum: the pair of such a row counts its sink."""
    bias = np.zeros((1, 1, 40, 70), np.float32)
    bias[..., 3, :] = bias[..., 20:, :] = 3000.0
    bias[..., 5, :] = -3000.0
    sinks = np.array([3001.0, 0.0], np.float32)
    mask = Mask.additive(bias)
    p, grad = problem("f32", (40, 70), (32, 32), (2, 1), mask=mask, sinks=sinks)
    found, truth = emulator.run(p, grad), exact_gradients(p, grad)
    for name, got in found.items():
        exact = getattr(truth, name[2:])
        # A weight errs as its score does, by half a unit in the last place of 3000.
        assert_close(got, exact, exact, 2.0**-13, name)


def test_nan_reaches_the_rows_and_keys_that_see_it(emulator: Emulator) -> None:
    p, grad = problem("bf16", (150, 150), mask=Mask.causal("top_left"))
    grad[0, 0, 100, 3] = np.nan
    p.key[0, 0, 140] = np.nan
    found = {name: np.isnan(x[0, 0]) for name, x in emulator.run(p, grad).items()}
    # Row 100's gradient is NaN; rows from 140 on see the NaN key, and with them every key.
    assert found["d_query"][[100, *range(140, 150)]].all()
    assert not found["d_query"][[*range(100), *range(101, 140)]].any()
    assert found["d_key"].all()
    grad[0, 0, 100, 3] = 0
    p.key[0, 0, 140] = 0
    p.value[0, 0, 145] = np.inf
    grad[0, 0, 30, 5] = np.inf
    found = {name: ~np.isfinite(x[0, 0]) for name, x in emulator.run(p, grad).items()}
    assert found["d_value"][:31, 5].all()
    assert not found["d_value"][31:140].any()
    assert not found["d_query"][31:140].any()


def test_fewer_blocks_than_work_take_it_in_turn(emulator: Emulator) -> None:
    for length, blocks in ((150, 2), (9, 1)):  # at last with queries that see nothing
        mask = Mask.causal("top_left" if length == 150 else "bottom_right")
        p, grad = problem("bf16", (150, length), heads=(2, 1), mask=mask)
        whole, turns = emulator.run(p, grad), emulator.run(p, grad, most_blocks=blocks)
        for name, got in turns.items():
            np.testing.assert_array_equal(got, whole[name])


def test_strided_layouts(emulator: Emulator) -> None:
    rng = np.random.default_rng(2)
    q, k, v, g = (
        aligned(rng.standard_normal((1, 80, 2, 64)).astype(DTYPES["bf16"])) for _ in range(4)
    )
    p = AttentionProblem.from_arrays(q, k, v, layout="bshd")
    check(emulator, p, g.transpose(0, 2, 1, 3))


def test_what_is_refused() -> None:
    view = ArrayView(0, (1, 1, 8, 256), (2048, 2048, 256, 1), "f32", 0)
    task = BackwardTask(*(view,) * 6, None, None, None, (), None, None, False, 1.0, False)
    with pytest.raises(bwd.UnsupportedError, match="at most 192"):
        bwd.refuse(task)
    small = ArrayView(0, (1, 1, 8, 64), (512, 512, 64, 1), "bf16", 0)
    shared = ArrayView(0, (1, 4, 8, 8), (0, 0, 8, 1), "f32", 0)
    task = BackwardTask(*(small,) * 6, None, small, shared, (), None, None, False, 1.0, True)
    with pytest.raises(bwd.UnsupportedError, match="broadcast"):
        bwd.refuse(task)
    with pytest.raises(bwd.UnsupportedError, match="softcap"):
        bwd.refuse(replace(task, softcap=2.0))
    assert math.prod(task.query.shape[:3]) * 16 == bwd.workspace_bytes(task)
