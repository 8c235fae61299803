"""The sm80 family compiles everywhere within its budget; its host side describes launches
right."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools

import pytest

from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.problem import SequenceSpan
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.compile import Compiler
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels.shipped import budget
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.tuning import sm80_attn_fwd as tuning

PLAIN = [("bf16",) * 3, ("f16",) * 3, ("f32",) * 3, ("f32", "tf32", "tf32")]

# Every architecture, every format, every head-dimension class and both variants, each pair once
# or so: the full product is what `adaattn kernels --arch ...` compiles.
MATRIX = [
    ("sm_80", ("bf16",) * 3, 64, {}),
    ("sm_80", ("f32",) * 3, 128, {}),
    ("sm_80", ("f16",) * 3, 128, {"array_mask": True}),
    ("sm_86", ("bf16",) * 3, 128, {}),
    ("sm_86", ("f32", "tf32", "tf32"), 256, {}),
    ("sm_89", ("f16",) * 3, 256, {}),
    ("sm_90a", ("bf16",) * 3, 128, {}),
    ("sm_90a", ("bf16",) * 3, 64, {}),
    ("sm_90a", ("bf16",) * 3, 256, {}),
    ("sm_90a", ("f32",) * 3, 64, {}),
    ("sm_90a", ("f32",) * 3, 128, {}),
    ("sm_90a", ("f32",) * 3, 256, {}),
    ("sm_90a", ("f32",) * 3, 128, {"array_mask": True}),
    ("sm_90a", ("bf16",) * 3, 128, {"vectorised": False}),
    ("sm_90a", ("f32", "bf16", "f16"), 128, {}),
    ("sm_100", ("bf16",) * 3, 128, {}),
    ("sm_100", ("f32", "tf32", "tf32"), 128, {}),
    ("sm_80", ("bf16",) * 3, 64, {"rule": 3}),
    ("sm_80", ("f32",) * 3, 128, {"rule": 3, "array_mask": True}),
    ("sm_80", ("bf16",) * 3, 128, {"listed": True}),
    ("sm_86", ("f16",) * 3, 64, {"listed": True, "array_mask": True}),
    ("sm_90a", ("f32",) * 3, 128, {"listed": True}),
    ("sm_90a", ("f32",) * 3, 256, {"listed": True, "vectorised": False}),
    ("sm_120", ("f32",) * 3, 128, {}),
    ("sm_120", ("bf16",) * 3, 160, {}),
]


@pytest.fixture(scope="module")
def compiler():
    with Compiler() as running:
        yield running


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("arch", "formats", "dim", "variant"),
    MATRIX,
    ids=[f"{a}-{'.'.join(f)}-{d}-{'.'.join(v) or 'plain'}" for a, f, d, v in MATRIX],
)
def test_compiles_within_its_budget(compiler: Compiler, arch, formats, dim, variant) -> None:
    spec = tuning.specialise(arch, *formats, dim, dim, **variant).spec(arch)
    built = compiler.compile(spec)
    assert budget(spec).violations(built.resources, spec.smem_bytes) == []


# --- tuning
# ------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_problem_has_a_legal_tile(arch: str) -> None:
    dims = (40, 128, 256)
    for dim_qk, dim_v in itertools.product(dims, dims):
        for input_format, qk, pv in itertools.product(
            sm80.INPUT_FORMATS, sm80.OPERAND_FORMATS, sm80.OPERAND_FORMATS
        ):
            for array_mask, vectorised in itertools.product((False, True), repeat=2):
                s = tuning.specialise(
                    arch, input_format, qk, pv, dim_qk, dim_v,
                    array_mask=array_mask, vectorised=vectorised,
                )  # fmt: skip
                assert s.dim_qk >= dim_qk
                assert s.dim_v >= dim_v
                assert s.smem_bytes <= tuning.ARCHITECTURES[arch][0] * 1024
                assert s.tile_m % (16 * s.warps) == 0


def test_measured_winners_are_chosen() -> None:
    """What docs/kernels/sm80_attn_fwd.md measured on an H200 is what the cost picks."""
    best = {("bf16", 128): (128, 64, 4, 2), ("f32", 128): (128, 64, 8, 2)}
    for (name, dim), tile in best.items():
        s = tuning.specialise("sm_90a", name, name, name, dim, dim)
        assert (s.tile_m, s.tile_n, s.warps, s.stages) == tile


def test_older_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="sm_75"):
        tuning.specialise("sm_75", *PLAIN[0], 64, 64)


# --- launches
# ----------------------------------------------------------------------------------
def view(shape: tuple[int, ...], dtype: str = "bf16", pointer: int = 4096) -> ArrayView:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return ArrayView(pointer, shape, tuple(reversed(strides)), dtype, 0)


def task(
    spans: list[tuple[int, int]] | None = None, mask: Mask | None = None, **changes
) -> Task:
    """Batch 2, heads 4 / 2, len 300 / 500; or sequences of these lengths, packed."""
    mask = mask or Mask.none()
    batch, len_q, len_kv = 2, 300, 500
    sequences = tuple(SequenceSpan(b, b, 0, len_q, 0, len_kv) for b in range(batch))
    if spans is not None:
        cu_q = list(itertools.accumulate((q for q, _ in spans), initial=0))
        cu_kv = list(itertools.accumulate((k for _, k in spans), initial=0))
        batch, len_q, len_kv = 1, cu_q[-1], cu_kv[-1]
        sequences = tuple(
            SequenceSpan(i, 0, cu_q[i], cu_q[i + 1], cu_kv[i], cu_kv[i + 1])
            for i in range(len(spans))
        )
    base = Task(
        view((batch, 4, len_q, 64)), view((batch, 2, len_kv, 64)), view((batch, 2, len_kv, 96)),
        view((batch, 4, len_q, 96)), view((batch, 4, len_q), "f32"), None, None, sequences,
        mask.left, mask.right, mask.alignment == "bottom_right", 0.125, "bf16", "bf16",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_uniform_task_is_one_launch_without_a_list() -> None:
    ((params, blocks),) = sm80.launches(task(), 128)
    work = params.work
    assert (work.unit_count, work.tiles, work.heads_per_unit) == (0, 3, 4)
    assert blocks == 2 * 4 * 3
    assert (work.batch, work.group_size) == (2, 2)
    assert (work.len_q, work.len_kv, params.dim_qk, params.dim_v) == (300, 500, 64, 96)
    assert (work.left, work.right) == (sm80.UNLIMITED, sm80.UNLIMITED)
    assert (params.query_batch, params.query_head, params.query_row) == (76800, 19200, 64)
    assert params.score_scale == pytest.approx(0.125 * 1.4426950408889634, rel=1e-7)


def test_ragged_units_come_longest_first_and_keep_their_place() -> None:
    ragged = task([(10, 20), (0, 7), (290, 30), (129, 0)])
    ((params, blocks),) = sm80.launches(ragged, 128)
    units = [
        tuple(getattr(params.work.units[i], name) for name, _ in sm80.Unit._fields_)
        for i in range(params.work.unit_count)
    ]
    # batch, head, q_start, len_q, kv_start, len_kv; the sequence without rows is left out
    assert units == [(0, 0, 10, 290, 27, 30), (0, 0, 300, 129, 57, 0), (0, 0, 0, 10, 0, 20)]
    assert blocks == 3 * 4 * 3


def test_chosen_heads_become_units_of_their_own() -> None:
    ((params, blocks),) = sm80.launches(task(heads=((1, 3), (0, 0), (1, 3))), 128)
    assert (params.work.unit_count, params.work.heads_per_unit) == (2, 1)
    assert [(u.batch, u.head) for u in params.work.units[:2]] == [(0, 0), (1, 3)]
    assert blocks == 2 * 3


def test_long_lists_take_several_launches() -> None:
    found = sm80.launches(task([(1 + i % 5, 3) for i in range(300)]), 128)
    assert [params.work.unit_count for params, _ in found] == [128, 128, 44]
    lengths = [
        u.len_q for params, _ in found for u in params.work.units[: params.work.unit_count]
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 300


def test_nothing_to_do_launches_nothing() -> None:
    assert sm80.launches(task([(0, 5), (0, 0)]), 128) == []
    assert sm80.launches(task(heads=()), 128) == []


def test_window_beyond_any_length_is_unlimited() -> None:
    wide = task(left=1 << 40, right=0, bottom_right=True)
    ((params, _),) = sm80.launches(wide, 128)
    assert (params.work.left, params.work.right, params.work.bottom_right) == (
        sm80.UNLIMITED,
        0,
        1,
    )


@pytest.mark.parametrize(
    ("name", "array", "vectorised"),
    [
        ("query", view((2, 4, 300, 64)), True),
        ("query", view((2, 4, 300, 64), pointer=4096 + 8), False),
        ("value", view((2, 2, 500, 100)), False),
        ("key", ArrayView(4096, (2, 2, 500, 64), (64000, 32000, 65, 1), "bf16", 0), False),
        ("key", ArrayView(4096, (1, 1, 500, 64), (3, 5, 64, 1), "bf16", 0), True),
    ],
)
def test_unaligned_arrays_take_the_slow_loads(
    name: str, array: ArrayView, vectorised: bool
) -> None:
    """Right everywhere, fast where rows begin on 16 bytes; strides of axes of one do not
    count."""
    assert sm80.is_vectorised(task(**{name: array})) is vectorised


def test_addresses_go_where_they_belong() -> None:
    ((params, _),) = sm80.launches(task(), 128)
    sm80.place(params, (1, 2, 3, 4, 5, 6, 0))
    names = ("query", "key", "value", "out", "lse", "allowed", "bias")
    assert [getattr(params, name) for name in names] == [1, 2, 3, 4, 5, 6, None]


def test_parameters_fit_what_every_driver_takes() -> None:
    assert ctypes.sizeof(sm80.Params) <= 4096


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"value": view((2, 2, 500, 264)), "out": view((2, 4, 300, 264))}, "dim_v=264"),
        ({"qk": "e4m3"}, "qk=e4m3"),
        ({"key": view((2, 2, 1 << 30, 64))}, "1073741824"),
    ],
)
def test_what_the_family_does_not_do_is_refused(changes: dict, text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        sm80.specialisation(task(**changes), "sm_90a")
