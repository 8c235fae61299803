"""Landmarks and chosen blocks by a plan, run on a CPU by the kernels' own source.

Held to the NumPy backend, which chooses by the same rules from the same seeds: both differ by
roundings, and where two keys are nearly as heavy, by which of them is a landmark.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels_on_cpu import Kernels, allocate, play_device
from sm80_on_cpu import problem, task_of

from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Landmark
from adaattn_core.testing.oracles import exact_attention
from adaattn_cuda import sampled
from adaattn_cuda.work.choosing import fields_of
from adaattn_cuda.work.geometry import Geometry
from adaattn_reference import blocks as reference_blocks
from adaattn_reference.backend import NumpyBackend
from adaattn_reference.geometry import Geometry as ReferenceFields
from adaattn_reference.view import ProblemViews


def peaked(p: AttentionProblem, seed: int = 0) -> AttentionProblem:
    """Add a few heavy keys and a drift, so that there is something to choose."""
    rng = np.random.default_rng(seed)
    key = p.key.astype(np.float32)
    heavy = rng.integers(0, p.len_kv, 12)
    key[:, :, heavy] += 2 * rng.standard_normal(key.shape[3]).astype(np.float32)
    query = p.query.astype(np.float32) * 0.5
    query += key[:, :, heavy].mean(axis=2).repeat(p.heads_q // p.heads_kv, 1)[:, :, None]
    p.key[...], p.query[...] = key, query
    return p


MASKS = {
    "causal": (Mask.causal("bottom_right"), (400, 400)),
    "causal, fewer rows": (Mask.causal("bottom_right"), (256, 500)),
    "causal, fewer keys": (Mask.causal("top_left"), (400, 300)),
    "none": (Mask.none(), (300, 420)),
    "lengths": (Mask.key_lengths([333]) & Mask.causal("top_left"), (400, 400)),
    "ragged": (
        Mask.ragged([0, 150, 150, 400], [0, 150, 160, 410]) & Mask.causal("bottom_right"),
        (400, 410),
    ),
}


def run(p: AttentionProblem, structure: Landmark, dtype: str, seed: int = 3):
    task, out, lse = task_of(p, dtype, dtype)
    structures = dict.fromkeys(p.heads(), structure)
    runs, odd = sampled.run_landmarks(task, structures, seed, allocate, 0)
    assert not odd
    kept = {i: found.kept(i) for found in runs for i in found.heads()}
    return out.astype(np.float64), lse, kept


SIZES: list[dict[str, Any]] = [
    {"band": 64, "group": 128, "tile": 64, "samples": 16, "tail": 64},
    {
        "band": 0,
        "group": 256,
        "tile": 128,
        "samples": 32,
        "pool": 32,
        "tail": 0,
        "fitted": False,
    },
    {"band": 64, "group": 128, "tile": 64, "samples": 8, "pool": 0, "tail": 128},
]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*((name, SIZES[0]) for name in MASKS)]
    + [(name, sizes) for name in ("causal", "none") for sizes in SIZES[1:]],
)
def test_landmarks_are_those_of_numpy(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, name: str, sizes: dict[str, Any]
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    mask, lens = MASKS[name]
    p = peaked(problem("f32", lens, (32, 48), heads=(2, 1), mask=mask))
    structure = Landmark(tau=0.2, screen_rank=0, **sizes)
    out, lse, kept = run(p, structure, "f32")
    plan = Plan.uniform(p, HeadPlan(structure=structure, qk="f32", pv="f32"), seed=3)
    theirs = NumpyBackend().run(p, plan)
    size = np.linalg.norm(theirs.out)
    assert np.linalg.norm(out - theirs.out) <= 2e-3 * size
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(theirs.lse))
    seen = np.isfinite(theirs.lse)
    assert np.abs(lse[seen] - theirs.lse[seen]).max() <= 2e-3
    for index in p.heads():
        facts = theirs.facts[index]
        assert kept[index].share == pytest.approx(facts.share, rel=2e-3)
        assert kept[index].rank == facts.rank
        assert kept[index].complete == (facts.dropped_mass_upper == 0)
    exact = exact_attention(p).out
    assert np.linalg.norm(out - exact) < 0.9 * np.linalg.norm(exact)


def test_narrow_formats(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    dtype = "bf16"
    play_device(monkeypatch, kernels, "sm_80")
    p = peaked(problem(dtype, (300, 400), heads=(4, 2), mask=Mask.causal("bottom_right")))
    structure = Landmark(tau=0.1, band=64, group=128, tile=64, screen_rank=0)
    out, _, kept = run(p, structure, dtype)
    plan = Plan.uniform(p, HeadPlan(structure=structure, qk=dtype, pv=dtype), seed=3)
    theirs = NumpyBackend().run(p, plan)
    other = theirs.out.astype(np.float64)
    assert np.linalg.norm(out - other) <= 0.02 * np.linalg.norm(other)
    for index, found in kept.items():
        assert found.share == pytest.approx(theirs.facts[index].share, rel=0.02)


def test_a_band_over_everything_is_exact(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    for mask in (Mask.causal("top_left"), Mask.none()):
        p = problem("f32", (300, 300), (64, 64), heads=(2, 1), mask=mask)
        structure = Landmark(band=1024, group=128, tile=64, screen_rank=0)
        out, _, kept = run(p, structure, "f32")
        exact = exact_attention(p).out
        assert np.linalg.norm(out - exact) <= 1e-5 * np.linalg.norm(exact)
        assert all(found.complete and found.share == 1 for found in kept.values())


def test_heads_that_see_nan_are_left_to_dense(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    p = problem("f32", (300, 300), heads=(2, 2), mask=Mask.causal("top_left"))
    p.key[0, 1, 20] = np.nan
    task, out, _ = task_of(p, "f32", "f32")
    structure = Landmark(band=64, group=128, tile=64, screen_rank=0)
    structures = dict.fromkeys(p.heads(), structure)
    runs, odd = sampled.run_landmarks(task, structures, 0, allocate, 0)
    assert odd == {(0, 1)}
    assert [run.heads() for run in runs] == [((0, 0),)]
    assert (out[0, 1] == 7).all()
    chosen = BlockSparse(tile_q=64, tile_kv=32, group=128)
    given, odd = sampled.chosen_blocks(task, dict.fromkeys(p.heads(), chosen), 0, allocate, 0)
    assert odd == {(0, 1)}
    assert list(given) == [(0, 0)]


BLOCK_MASKS = MASKS | {
    "window": (Mask.sliding_window(120, 30, "bottom_right"), (300, 350)),
    "boolean": (
        Mask.boolean(np.random.default_rng(2).random((1, 2, 300, 350)) < 0.5), (300, 350),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "band"),
    [*((name, 64) for name in BLOCK_MASKS), ("causal", 0), ("none", 0)],
)
def test_blocks_are_those_that_numpy_chooses(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, name: str, band: int
) -> None:
    play_device(monkeypatch, kernels, "sm_80")
    mask, lens = BLOCK_MASKS[name]
    p = peaked(problem("f32", lens, (32, 48), heads=(2, 1), mask=mask))
    structure = BlockSparse(tau=0.2, band=band, tile_q=64, tile_kv=32, group=128, samples=16)
    task, _, _ = task_of(p, "f32", "f32")
    structures = dict.fromkeys(p.heads(), structure)
    given, odd = sampled.chosen_blocks(task, structures, 5, allocate, 0)
    assert not odd
    views = ProblemViews(p)
    differ = total = 0
    for index in p.heads():
        theirs = reference_blocks.chosen_blocks(views[index], structure, 5)
        own = given[index].blocks
        assert own is not None
        assert len(own) == len(theirs)
        for mine, other in zip(own, theirs, strict=True):
            differ += len(set(mine) ^ set(other))
            total += len(other)
    assert differ <= 0.02 * total  # blocks whose masses are nearly alike


@pytest.mark.parametrize("name", MASKS)
def test_fields_are_those_of_numpy(name: str) -> None:
    mask, lens = MASKS[name]
    p = problem("f32", lens, mask=mask)
    geometry = Geometry(
        p.sequences, 1, 1, 64, 64, mask.alignment == "bottom_right", mask.left, mask.right
    )
    views = ProblemViews(p)
    for sizes in ((64, 64, 0, 128), (64, 128, 192, 0), (0, 64, 100, 64)):
        pool, tile, band, tail = sizes
        band = band // max(pool, 1) * max(pool, 1)
        structure = Landmark(pool=pool, tile=tile, band=band, tail=tail, group=2 * tile)
        for span in p.sequences:
            view = views[span.index, 0]
            theirs = ReferenceFields.of(view, structure)
            own = fields_of(structure, geometry, span)
            if theirs is None:
                assert not span.len_q
                continue
            assert own is not None
            assert own.groups() == theirs.groups()
            rows = np.arange(span.len_q)
            for mine, other in zip(
                own.near_of_rows(rows), theirs.near_of_rows(rows), strict=True
            ):
                np.testing.assert_array_equal(mine, other)
            assert [own.keys_of(g) for g in own.groups()] == [
                theirs.keys_of(g) for g in theirs.groups()
            ]


def test_windows_have_no_far_field() -> None:
    p = problem("f32", (300, 300), mask=Mask.sliding_window(40, 0, "top_left"))
    geometry = Geometry(p.sequences, 1, 1, 64, 64, False, 40, 0)
    assert fields_of(Landmark(), geometry, p.sequences[0]) is None
    assert "window" in str(sampled.landmarks_refusal(Landmark(), None))
