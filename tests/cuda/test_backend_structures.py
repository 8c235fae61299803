"""The backend's structures from the front door to the kernels' own source, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernels_on_cpu import Kernels, allocate, play_device
from sm80_on_cpu import describe, problem

from adaattn_core import ErrorBudget, attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.structure import BlockSparse, Dense, Landmark
from adaattn_core.testing.oracles import exact_attention
from adaattn_cuda import backend as backend_module
from adaattn_cuda import dispatch, starts
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device import driver
from adaattn_reference.backend import NumpyBackend


class _Library:
    held: list[Any]

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        room, at = allocate(int(np.prod(shape)) * (4 if dtype == "f32" else like.itemsize))
        _Library.held.append(room)
        first = at - room.ctypes.data
        kind = np.dtype(np.float32) if dtype == "f32" else like.dtype
        size = int(np.prod(shape)) * kind.itemsize
        return room[first : first + size].view(kind).reshape(shape)

    def outputs(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        out, lse = self.empty(shape, dtype, like), self.empty(shape[:3], "f32", like)
        return out, lse, (out.ctypes.data, lse.ctypes.data)

    def stream(self, device: int) -> int:
        return 0

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)


class _Records:
    """Largest squared norms, and the output's sum of squares; nothing else is asked here."""

    workspace_bytes = 0

    def __init__(self, plan: Any, arrays: Any, masks: Any, like: Any, library: Any, _: int):
        self._problem, out = plan, arrays[3]
        memory = (ctypes.c_float * int(np.prod(out.shape))).from_address(out.pointer)
        self._out = np.frombuffer(memory, np.float32).reshape(out.shape)

    def read(self) -> list[Any]:
        p = self._problem
        squares = [(x.astype(np.float64) ** 2).sum(-1) for x in (p.query, p.key, p.value)]
        found = [x.max(-1) for x in squares] + [(self._out.astype(float) ** 2).sum((2, 3))]
        return [np.pad(x[..., None], ((0, 0), (0, 0), (0, 4))) for x in found]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Iterator[CudaBackend]:
    _Library.held = []
    play_device(monkeypatch, kernels, "sm_80")

    def view(x: Any) -> Any:
        return describe(x)._replace(device=0)

    for module in (backend_module, dispatch):
        monkeypatch.setattr(module, "view", view)
    monkeypatch.setattr(driver, "load_driver", lambda: None)
    monkeypatch.setattr(driver, "current_device", lambda: 0)
    monkeypatch.setattr(backend_module, "library_of", lambda array: _Library())
    monkeypatch.setattr(starts, "library_of", lambda array: _Library())
    monkeypatch.setattr(backend_module, "RowFacts", _Records)
    monkeypatch.setattr(backend_module, "FactsPlan", lambda problem, *others: problem)
    monkeypatch.setattr(backend_module, "nvrtc_version", lambda: "13.0")
    return CudaBackend()


FAR = Landmark(tau=0.2, band=64, group=128, tile=64, samples=16, screen_rank=0, tail=64)
CHOSEN = BlockSparse(tau=0.2, band=32, tile_q=64, tile_kv=32, group=128, samples=16)
GIVEN = BlockSparse.from_mask(
    np.random.default_rng(1).random((5, 10)) < 0.5, tile_q=64, tile_kv=32
)


def causal(dtype: str = "f32") -> AttentionProblem:
    return problem(dtype, (300, 300), (32, 40), (4, 2), mask=Mask.causal("top_left"))


def test_every_head_runs_as_it_is_planned(backend: CudaBackend) -> None:
    p = causal()
    structures = (Dense(), FAR, CHOSEN, GIVEN)
    plan = Plan({(0, h): HeadPlan(structure=structures[h]) for h in range(4)}, seed=5)
    raw = backend.run(p, plan)
    theirs = NumpyBackend().run(p, plan)
    for head in range(4):
        other = theirs.out[0, head]
        away = np.linalg.norm(raw.out[0, head] - other)
        assert away <= 2e-3 * np.linalg.norm(other), head
        ours, facts = raw.facts[0, head], theirs.facts[0, head]
        assert ours.share == pytest.approx(facts.share, rel=0.01)
        assert ours.rank == facts.rank
        assert ours.dropped_mass_upper == facts.dropped_mass_upper
    assert backend.provenance()["kernels"].count("sm80_attn_fwd") == 4
    # One head again, another way, into the same arrays.
    before = raw.out.copy()
    backend.run(p, plan.with_heads({(0, 1): HeadPlan()}), heads=[(0, 1)], into=raw)
    np.testing.assert_array_equal(raw.out[0, [0, 2, 3]], before[0, [0, 2, 3]])
    assert raw.facts[0, 1].share == 1
    assert raw.facts[0, 2].share < 1


@pytest.mark.parametrize("structure", [FAR, CHOSEN, GIVEN])
def test_drawn_rows_certify_what_no_theorem_does(backend: CudaBackend, structure: Any) -> None:
    p = causal()
    plan = Plan.uniform(p, HeadPlan(structure=structure))
    budget = ErrorBudget(rel=1e-3, on_violation="report")
    result = attention(
        p.query, p.key, p.value, mask=p.mask, plan=plan, budget=budget, backend=backend
    )
    assert "sampled" in result.certificate.guarantee
    exact = exact_attention(p).out
    for head in range(4):
        rms = np.sqrt((result.out[0, head].astype(np.float64) ** 2).sum(-1).mean())
        away = np.linalg.norm(result.out[0, head] - exact[0, head], axis=-1) / rms
        # Few rows are compared whole, so the sentence is the quantile itself.
        sentence = result.certificate[0, head]
        assert np.quantile(away, 0.9) <= sentence.upper
        if sentence.guarantee == "sampled":  # else nothing was left out
            assert sentence.upper <= 1.01 * away.max() + 1e-6


def test_heads_that_miss_a_budget_end_dense(backend: CudaBackend) -> None:
    p = causal()
    plan = Plan.uniform(p, HeadPlan(structure=GIVEN))
    result = attention(
        p.query, p.key, p.value, mask=p.mask, plan=plan, budget=0.01, backend=backend
    )
    assert {head.structure.kind for head in result.plan.heads.values()} == {"dense"}
    exact = exact_attention(p).out
    assert np.linalg.norm(result.out - exact) <= 1e-5 * np.linalg.norm(exact)


def test_heads_that_see_nan_run_dense_and_are_named(backend: CudaBackend) -> None:
    p = causal()
    p.value[0, 1, 20, 3] = p.key[0, 1, 20, 3] = np.nan
    plan = Plan.uniform(p, HeadPlan(structure=FAR))
    raw = backend.run(p, plan)
    assert raw.ran_dense == {(0, 2), (0, 3)}
    lost = np.isnan(raw.out[0]).any(axis=-1)
    assert not lost[:2].any()
    np.testing.assert_array_equal(lost[2:], np.arange(300) >= np.full((2, 1), 20))


def test_equal_blocks_share_a_work_list(backend: CudaBackend) -> None:
    """A plan made anew from the same mask takes the launch of the one before."""
    p = causal()
    for _ in range(2):
        same = replace(GIVEN, blocks=tuple(tuple(row) for row in GIVEN.blocks or ()))
        backend.run(p, Plan.uniform(p, HeadPlan(structure=same)))
    assert backend._starts.remembered == 1
