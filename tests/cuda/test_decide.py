"""decide.cuh compiled for the CPU equals its NumPy twins bit for bit, whatever is measured."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import adaattn_kernels_cu as kernels
from adaattn_core.formats import FORMATS
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import (
    CANDIDATE,
    CHOICE,
    FALLBACK,
    HEAD_MEASURES,
    MAX_CANDIDATES,
    TABLE,
    Candidate,
    DecisionTable,
    decide_table,
    escalate_table,
)
from adaattn_core.structure import STRUCTURES, Landmark, ScoreSkip

UNIT = Path(__file__).parent / "emulation" / "decide_unit.cpp"
HEADS = 4096
TABLES = 60


@pytest.fixture(scope="module")
def compiled(cxx: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("decide") / "decide.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
    command = [cxx, *flags, "-I", str(kernels.root()), str(UNIT), "-o", str(built)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return ctypes.CDLL(str(built))


def test_layouts_and_codes_are_mirrored(compiled: ctypes.CDLL) -> None:
    dtypes = (CANDIDATE, TABLE, HEAD_MEASURES, CHOICE)
    expected = [d.fields[name][1] for d in dtypes for name in d.names]
    found = (ctypes.c_long * len(expected))()
    compiled.offsets(found)
    assert list(found) == expected
    words = [MAX_CANDIDATES, FALLBACK, *range(len(STRUCTURES)), *range(len(FORMATS))]
    codes = (ctypes.c_int * len(words))()
    compiled.codes(codes)
    assert list(codes) == words
    names = Path(kernels.root() / "adaattn/plan/decide.cuh").read_text()
    spelled = ", ".join(f"k{name.capitalize()}" for name in FORMATS)
    assert spelled in names
    kinds = ("".join(word.capitalize() for word in kind.split("_")) for kind in STRUCTURES)
    assert ", ".join(f"k{kind}" for kind in kinds) in names


SPECIAL = np.array(
    [0, -0.0, 1, 0.5, np.nan, np.inf, -np.inf, -1, 1e-45, 1e-38, 3.4028235e38], np.float32
)


def drawn(rng: np.random.Generator, shape: tuple[int, ...], odd: float) -> NDArray[np.float32]:
    """Draw numbers: uniform ones, a few round ones that tie, and a share of special ones."""
    x = rng.random(shape, dtype=np.float32)
    coarse = rng.random(shape) < 0.4
    x[coarse] = np.round(x[coarse] * 4) / np.float32(4)
    special = rng.random(shape) < odd
    x[special] = rng.choice(SPECIAL, int(special.sum()))
    return x


def drawn_table(rng: np.random.Generator) -> DecisionTable:
    count = int(rng.integers(0, MAX_CANDIDATES + 1))
    structures = [ScoreSkip(lam=0.01), Landmark(tau=0.1), Landmark(tau=0.3)]
    limits = rng.choice(
        [0.25, 0.5, 0.9, 1.0, np.inf], (count, 4), p=[0.05, 0.1, 0.1, 0.1, 0.65]
    )
    costs = drawn(rng, (count, 2), 0.0)
    candidates = tuple(
        Candidate(HeadPlan(structures[rng.integers(3)]), *map(float, cost), *map(float, limit))
        for cost, limit in zip(costs, limits, strict=True)
    )
    aims = [*map(float, rng.choice([0.1, 0.25, 0.5, 0.75, 1.0, np.inf], 2)), 0.0]
    aim, escalation_aim = aims[0], aims[int(rng.integers(1, 3))]
    worthwhile = float(rng.choice([0.5, 0.8, 1.0, np.inf]))
    return DecisionTable(candidates, HeadPlan(), aim, escalation_aim, worthwhile)


def drawn_measures(rng: np.random.Generator, odd: float) -> NDArray[Any]:
    measures = np.zeros(HEADS, HEAD_MEASURES)
    for name in HEAD_MEASURES.names:  # type: ignore[union-attr]
        few = odd / 4 if measures[name].ndim == 1 else odd
        measures[name] = drawn(rng, measures[name].shape, few)
    return measures


def pointer(x: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize("odd", [0.0, 0.02, 0.5])
def test_the_twins_choose_alike_bit_for_bit(compiled: ctypes.CDLL, odd: float) -> None:
    rng = np.random.default_rng(int(odd * 100))
    outcomes: set[int] = set()
    for _ in range(TABLES):
        table, measures = drawn_table(rng), drawn_measures(rng, odd)
        record, found = table.record, np.zeros(HEADS, CHOICE)
        compiled.decide_all(pointer(record), pointer(measures), HEADS, pointer(found))
        expected = decide_table(table, measures)
        assert found.tobytes() == expected.tobytes()
        outcomes |= set(expected["outcome"].tolist())
        if not table.candidates:
            continue
        current = rng.integers(-1, len(table.candidates), HEADS).astype(np.int32)
        upper = drawn(rng, (HEADS,), odd)
        inputs = (record, measures, current, upper)
        compiled.escalate_all(*map(pointer, inputs), HEADS, pointer(found))
        expected = escalate_table(table, measures, current, upper)
        assert found.tobytes() == expected.tobytes()
    assert outcomes == ({0, 2, 3, 4, 5} if odd == 0 else set(range(6)))
