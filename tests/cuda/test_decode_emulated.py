"""The decode kernel's own source, run on a CPU: pages, masks, splits, both ways of copying.

Only the instruction headers are replaced (emulation/adaattn/ptx): what a copy brings lands when
it is waited for, no sooner. The truth is float64 over what the pages hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decode_on_cpu import DecodeEmulator

from adaattn_core.testing.paged import PagedSpec
from adaattn_cuda.tuning.smxx_attn_decode import Specialisation

UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}
BASE = PagedSpec(starts=(0, 70, 5), lengths=(300, 333, 5), group=4, page_len=64, dim_qk=128,
                 dim_v=128, dtype="bf16")  # fmt: skip


@pytest.fixture(scope="module")
def emulator(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> DecodeEmulator:
    return DecodeEmulator(cxx, tmp_path_factory.mktemp("emulated"))


def special(
    spec: PagedSpec, *, bulk: bool, skip: bool = False, tiles: int = 1, warps: int = 2,
    stages: int | None = None,
) -> Specialisation:  # fmt: skip
    code = spec.narrow or "i8"
    if stages is None:
        stages = (1 if skip else spec.dim_v // 64) + bulk
    return Specialisation(
        spec.dtype, code, code, spec.dim_v, tiles, warps, stages, skip, bulk
    )  # fmt: skip


def check(
    emulator: DecodeEmulator, spec: PagedSpec, chosen: Specialisation, splits: int,
    **arguments: Any,
) -> None:  # fmt: skip
    out, lse, dropped = emulator.run(spec, chosen, splits, **arguments)
    exact = spec.stored(left=arguments.get("left", -1))
    blind = exact.lse == -np.inf
    assert (out[blind] == 0).all()
    assert (lse[blind] == -np.inf).all()
    assert (dropped == 0).all()
    error = np.linalg.norm(out.astype(np.float64) - exact.out)
    assert error <= UNIT[spec.dtype] * np.linalg.norm(exact.out)
    # Narrow pages: queries rounded to f16 twice.
    moved = np.abs(lse[~blind] - exact.lse[~blind]).max()
    assert moved <= 2.0**-12 * np.abs(exact.lse[~blind]).max()


@pytest.mark.parametrize(
    ("narrow", "bulk"), [("", True), ("i8", True), ("e4m3", True), ("", False), ("i8", False)]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_formats_and_dims(emulator: DecodeEmulator, dim: int, narrow: str, bulk: bool) -> None:
    spec = replace(BASE, dim_qk=dim, dim_v=dim, narrow=narrow)
    check(emulator, spec, special(spec, bulk=bulk), 3)


CASES = {
    "f16": (replace(BASE, dtype="f16"), {}),
    "pages of three chunks": (replace(BASE, page_len=192, lengths=(700,), starts=(17,)), {}),
    "nothing to see": (replace(BASE, lengths=(0, 70, 40), starts=(0, 70, 0)), {}),
    "causal rows of two tiles": (
        replace(BASE, dim_qk=64, dim_v=64, len_q=4, causal=True), {"tiles": 2}
    ),
    "rows that see all": (replace(BASE, dim_qk=64, dim_v=64, len_q=3), {"tiles": 2}),
    "many slots": (BASE, {"stages": 12}),
    "one warp": (BASE, {"warps": 1}),
}  # fmt: skip


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_shapes(emulator: DecodeEmulator, case: str, bulk: bool) -> None:
    spec, sizes = CASES[case]
    spec = replace(spec, narrow="i8")
    for splits in (1, 4):
        check(emulator, spec, special(spec, bulk=bulk, **sizes), splits)


def test_windows(emulator: DecodeEmulator) -> None:
    spec = replace(BASE, dim_qk=64, dim_v=64, len_q=2, causal=True, narrow="i8")
    check(emulator, spec, special(spec, bulk=True), 2, left=100)


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("narrow", ["", "i8"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_unread_values_weigh_what_is_said(
    emulator: DecodeEmulator, dim: int, narrow: str, bulk: bool
) -> None:
    spec = replace(
        BASE, page_len=128, lengths=(1500, 711), starts=(0, 70), dim_qk=dim, dim_v=dim,
        narrow=narrow, peak=14 / dim**0.5,
    )  # fmt: skip
    scale = 3 / dim**0.5
    exact = spec.stored(scale=scale)
    for lam in (1e-5, 1e-3):
        chosen = special(spec, bulk=bulk, skip=True)
        out, lse, dropped = emulator.run(spec, chosen, 2, lam=lam, scale=scale)
        assert (dropped > 0).all()
        assert (dropped[..., 0] <= lam * np.array(spec.lengths)[:, None]).all()
        whole = lse - np.log1p(-dropped.astype(np.float64))
        assert np.abs(whole - exact.lse).max() <= 2.0**-12 * np.abs(exact.lse).max()
        error = np.linalg.norm(out.astype(np.float64) - exact.out)
        assert error <= (UNIT["bf16"] + dropped.max()) * np.linalg.norm(exact.out)
    # A threshold that nothing falls under: the way of reading values alone is another.
    check_all = emulator.run(
        spec, special(spec, bulk=bulk, skip=True), 2, lam=1e-30, scale=scale
    )
    assert np.abs(check_all[2]).max() <= 1e-28


def test_runs_are_left_by_what_they_weigh_in_the_mean(emulator: DecodeEmulator) -> None:
    """More than by their largest weight, no more than by the mean over all that a row sees."""
    spec = replace(
        BASE, page_len=128, lengths=(2048,), starts=(0,), heads_kv=2, group=1, dim_qk=64,
        dim_v=64, peak=1.75,
    )  # fmt: skip
    scale, lam = 1 / 8, 1e-4
    chosen = special(spec, bulk=True, skip=True)
    dropped = emulator.run(spec, chosen, 2, lam=lam, scale=scale)[2][0, :, 0]
    query, key, _ = (x.astype(np.float64) for x in spec.arrays)
    scores = scale * (query @ key.swapaxes(2, 3))[0, :, 0]
    weights = np.exp(scores - spec.stored(scale=scale).lse[0])
    runs = weights.reshape(len(weights), -1, 64)[:, 1:-1]
    by_largest, by_mean = (
        np.where(size <= lam, runs.sum(2), 0).sum(1) for size in (runs.max(2), runs.mean(2))
    )
    assert (dropped > 2 * by_largest).all()
    assert (dropped <= by_mean * (1 + 2.0**-10)).all()


def test_a_value_nobody_sees_is_not_read_as_a_number(emulator: DecodeEmulator) -> None:
    """What lies on pages outside the visible keys is NaN in all of these tests; here, most."""
    spec = replace(BASE, page_len=256, lengths=(130, 20), starts=(129, 3))
    check(emulator, spec, special(spec, bulk=True), 3)
