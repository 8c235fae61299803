"""The short way over pages, without a device: what is launched, and what is remembered."""

from __future__ import annotations

from typing import Any

import pytest

from adaattn_core.decoding import DevicePages
from adaattn_core.errors import UnsupportedError
from adaattn_cuda import paged
from adaattn_cuda.device.views import contiguous
from adaattn_cuda.kernels.smxx_attn_decode import PageAddresses, Rows
from adaattn_cuda.paged import PagedRuns

torch = pytest.importorskip("torch")


class Launch:
    made: list[Rows]
    started: list[tuple[Any, ...]]

    def __init__(self, rows: Rows, stream: int) -> None:
        Launch.made.append(rows)

    def start(self, *arguments: Any) -> None:
        Launch.started.append(arguments)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    Launch.made, Launch.started = [], []
    monkeypatch.setattr(paged, "Decode", Launch)
    monkeypatch.setattr(
        paged, "view", lambda x: contiguous(x.data_ptr(), tuple(x.shape), "bf16", 0)
    )
    library = paged.library_of(torch.empty(0))
    monkeypatch.setattr(library, "stream", lambda device: 99)


def cache(length: int, dim: int = 64, narrow: bool = True) -> DevicePages:
    wide = torch.zeros(4, 128, dim, dtype=torch.bfloat16)
    codes = torch.zeros(4, 128, dim, dtype=torch.int8)
    scales = [torch.zeros(4), *(torch.zeros(4, dim, dtype=torch.float16) for _ in "cr")]
    parts = (codes, *scales) if narrow else None
    table = torch.zeros(2, 2, 5, dtype=torch.int32)
    lengths, starts = torch.full((2,), length), torch.zeros(2)
    return DevicePages(wide, wide, parts, parts, "i8", table, lengths, starts, length)


def step(runs: PagedRuns, pages: DevicePages, dim: int = 64, lam: float = 0.0) -> Any:
    query = torch.zeros(2, 4, 1, dim, dtype=torch.bfloat16)
    return runs.decode(query, pages, scale=0.125, causal=True, left=-1, lam=lam)


def test_a_step_is_launched_where_everything_lies() -> None:
    pages = cache(300)
    out, lse, dropped = step(PagedRuns(), pages, lam=1e-4)
    assert out.shape == (2, 4, 1, 64)
    assert lse.shape == dropped.shape == (2, 4, 1)
    assert lse.dtype == dropped.dtype == torch.float32
    (rows,) = Launch.made
    assert (rows.dtype, rows.batch, rows.heads_q, rows.heads_kv, rows.len_q) == (
        "bf16",
        2,
        4,
        2,
        1,
    )
    assert (rows.dim, rows.page_len, rows.causal, rows.left, rows.lam) == (
        64,
        128,
        True,
        -1,
        1e-4,
    )
    assert rows.keys_max >= 300
    (started,) = Launch.started
    assert started[1:4] == (out.data_ptr(), lse.data_ptr(), dropped.data_ptr())
    where: PageAddresses = started[4]
    parts: Any = pages.key_narrow
    assert where.key_narrow == tuple(x.data_ptr() for x in parts)
    assert where.table == pages.table.data_ptr()
    assert where.table_strides == (10, 5)
    assert (where.lengths, where.starts) == (pages.lengths.data_ptr(), pages.starts.data_ptr())
    assert started[5] == 99


def test_a_growing_cache_finds_its_launch_again() -> None:
    runs = PagedRuns()
    for length in range(300, 320):
        step(runs, cache(length))
    assert len(Launch.made) == 1
    step(runs, cache(300, narrow=False))
    step(runs, cache(9000))
    step(runs, cache(300), lam=1e-3)
    assert len(Launch.made) == 3
    assert len(Launch.started) == 23


def test_sizes_without_a_kernel_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="dim 96"):
        step(PagedRuns(), cache(300, dim=96), dim=96)
