"""What the facts kernel is told: rows of every part, and where their figures go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.kernels import smxx_operand_norms as operand_norms
from adaattn_cuda.kernels.smxx_operand_norms import SLOTS, FactsPlan, RowFacts

EDGES = (0, 70, 70, 270, 300)
RECORDS = 1 << 30
NO_MASKS = (None, None)


class Call:
    """Records what would be launched."""

    started: list[dict[str, Any]]

    def __init__(self, kernel: Any, params: Any, grid: int) -> None:
        self.params, self.grid, self.stream = params, grid, 0

    def to(self, stream: int) -> Call:
        self.stream = stream
        return self

    def start(self, device: int) -> None:
        p = self.params
        rows = [(r.data, r.heads, r.len, r.dim, r.first_unit) for r in p.arrays]
        Call.started.append(
            {"rows": rows, "records": p.records, "blocks": p.blocks,
             "vectorised": p.vectorised, "grid": self.grid, "to": (device, self.stream)}
        )  # fmt: skip


class Kernel:
    def prepare(self, device: int) -> None:
        assert device == 2


class Library:
    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        assert dtype == "f32"
        return shape

    def pointer(self, array: Any) -> int:
        return RECORDS


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    Call.started = []
    facts = driver.DeviceFacts("a card", "sm_80", 108, 166912)
    monkeypatch.setattr(driver, "device_facts", lambda device: facts)
    monkeypatch.setattr(driver, "Call", Call)
    monkeypatch.setattr(operand_norms, "kernel_of", lambda spec, threads, stream: Kernel())


def problem(mask: Mask | None, batch: int = 1) -> AttentionProblem:
    q, kv = (np.zeros((batch, heads, 300, 64), np.float32) for heads in (4, 2))
    return AttentionProblem.from_arrays(q, kv, kv, mask=mask)


def views(base: int, batch: int = 1) -> tuple[ArrayView, ...]:
    shapes = ((batch, heads, 300, 64) for heads in (4, 2, 2, 4))
    return tuple(
        contiguous(base + (i << 24), shape, "f32", 2) for i, shape in enumerate(shapes)
    )


def test_a_whole_batch_is_one_launch() -> None:
    plan = FactsPlan(problem(None, batch=3), views(4096, batch=3), NO_MASKS, 99)
    facts = RowFacts(plan, views(4096, batch=3), (0, 0), None, Library(), 99)  # type: ignore[arg-type]
    (launch,) = Call.started
    assert plan.shape == (1, 3 * 12, 3, len(SLOTS))
    assert facts.workspace_bytes == 8 * 36 * 3 * len(SLOTS)
    assert launch["grid"] == 36 * 3
    assert launch["to"] == (2, 99)
    assert launch["records"] == RECORDS
    assert launch["vectorised"] == 1
    assert [row[4] for row in launch["rows"]] == [0, 12, 18, 24], "units of the arrays follow"


def test_sequences_are_found_at_any_address() -> None:
    mask = Mask(cu_seqlens_q=EDGES, cu_seqlens_kv=EDGES)
    plan = FactsPlan(problem(mask), views(4096), NO_MASKS, 99)
    for base, stream in ((4096, 99), (1 << 40, 7)):
        Call.started.clear()
        plan.start(views(base), (0, 0), RECORDS, 0, stream)
        assert len(Call.started) == 4
        for number, launch in enumerate(Call.started):
            begin, end = EDGES[number : number + 2]
            assert launch["to"] == (2, stream)
            assert launch["records"] == RECORDS + 8 * number * 12 * 3 * len(SLOTS)
            for i, (address, heads, length, dim, _) in enumerate(launch["rows"]):
                assert address == base + (i << 24) + begin * 64 * 4
                assert (heads, length, dim) == ((4, 2, 2, 4)[i], end - begin, 64)


@pytest.mark.parametrize(
    ("mask", "rows", "keys"),
    [
        (Mask.causal("top_left"), (0, 300), (0, 300)),
        (Mask.sliding_window(40, 0, "bottom_right"), (0, 300), (160, 500)),
        (Mask.sliding_window(0, 20, "top_left"), (0, 300), (0, 320)),
        (Mask.sliding_window(None, 0, "bottom_right"), (0, 300), (0, 500)),
        (Mask.none(), (0, 300), (0, 500)),
    ],
)
def test_only_what_rows_see_is_looked_at(mask, rows, keys) -> None:
    q, kv = (np.zeros((2, 2, n, 64), np.float32) for n in (300, 500))
    lengths = (300, 500, 500, 300)
    arrays = tuple(
        contiguous(4096 + (i << 24), (2, 2, n, 64), "f32", 2) for i, n in enumerate(lengths)
    )
    plan = FactsPlan(AttentionProblem.from_arrays(q, kv, kv, mask=mask), arrays, NO_MASKS, 99)
    plan.start(arrays, (0, 0), RECORDS, 0, 99)
    seen = (rows, keys, keys, (0, 300))  # every row of the output counts in its rms
    for i, (first, last) in enumerate(seen):
        address, _, length, _, _ = Call.started[0]["rows"][i]
        assert (address, length) == (arrays[i].pointer + first * 64 * 4, last - first)


def test_rows_that_see_nothing_are_not_looked_at() -> None:
    q, kv = (np.zeros((1, 1, n, 64), np.float32) for n in (300, 100))
    arrays = tuple(
        contiguous(4096 + (i << 24), (1, 1, n, 64), "f32", 2)
        for i, n in enumerate((300, 100, 100, 300))
    )
    mask = Mask.causal("bottom_right")
    plan = FactsPlan(AttentionProblem.from_arrays(q, kv, kv, mask=mask), arrays, NO_MASKS, 99)
    plan.start(arrays, (0, 0), RECORDS, 0, 99)
    address, _, length, _, _ = Call.started[0]["rows"][0]
    assert (address, length) == (arrays[0].pointer + 200 * 64 * 4, 100)


def test_rows_off_the_grid_are_read_one_by_one() -> None:
    plan = FactsPlan(problem(None), views(4100), NO_MASKS, 99)
    plan.start(views(4100), (0, 0), RECORDS, 0, 99)
    assert Call.started[0]["vectorised"] == 0
