"""Runs over a cache on pages: one kernel for all heads, facts read when somebody asks.

Every head of a group runs alike: the kernel packs the rows of a key/value head. Score-then-skip
is dense with a threshold, so heads of both kinds run in one launch each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import numpy as np

from adaattn_core.decoding import DevicePages
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RunFacts
from adaattn_core.paged import PagedKV
from adaattn_core.pages import Pages
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.structure import ScoreSkip
from adaattn_cuda.device import driver
from adaattn_cuda.device.library import Library, library_of
from adaattn_cuda.device.views import ArrayView, view
from adaattn_cuda.kernels.smxx_attn_decode import Decode, PageAddresses, Rows
from adaattn_cuda.page_facts import PageFacts, pointer_of
from adaattn_cuda.recent import Recent
from adaattn_cuda.tuning.smxx_attn_decode import CHUNK_KEYS, DIMS

__all__ = ["STRUCTURES", "PagedRuns"]

STRUCTURES = ("dense", "score_skip")
"""What runs over pages."""
ROWS_MOST = 64
"""Rows of a head: a decode step, a speculative one, a short chunk."""


class _Step(NamedTuple):
    """What is remembered of decode steps of one kind."""

    launch: Decode
    device: int
    shape: tuple[int, ...]


class PagedRuns:
    """The backend's `run` for problems on pages; launches are remembered by kind."""

    def __init__(self) -> None:
        self._launches: Recent[Decode] = Recent(256)
        self._steps: Recent[_Step] = Recent(256)

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        heads: Collection[HeadIndex] | None,
        into: RawResult | None,
    ) -> tuple[RawResult, list[Decode]]:
        """See `adaattn_core.backend.Backend.run`; also return what was launched."""
        kv = cast(PagedKV, problem.paged)
        if problem.softcap is not None or problem.sinks is not None:
            raise UnsupportedError(
                got="a softcap or sinks over pages",
                needed="a plain softmax",
                do='gather() the pages, or use backend="numpy"',
            )
        chosen = dict(plan.heads) if heads is None else {i: plan[i] for i in heads}
        for index, head in chosen.items():
            _check_head(index, head, problem)
        query = view(problem.query)
        _check_pages(problem, kv, query)
        library = library_of(problem.query)
        stream = library.stream(query.device)
        shape = (*query.shape[:3], problem.dim_v)
        made: list[Decode] = []
        parts = []
        with driver.OnDevice(query.device):
            pages, keep = _addresses(kv, query.device)
            for lam in sorted({_lam(head) for head in chosen.values()}):
                out, lse, written = library.outputs(shape, problem.dtype, problem.query)
                dropped = library.empty(shape[:3], "f32", problem.query)
                launch = self._launch(problem, kv, query, lam, stream)
                addresses = (*written, library.pointer(dropped))
                launch.start(query.pointer, *addresses, pages, stream)
                made.append(launch)
                parts.append((lam, out, lse, dropped))
        _ = keep  # tables outlive the launches that read them, freed behind them
        raw = into
        if raw is None:
            raw = RawResult(parts[0][1], parts[0][2])
            raw.facts = cast("dict[HeadIndex, RunFacts]", PageFacts(problem))
        facts = cast(PageFacts, raw.facts)
        for lam, out, lse, dropped in parts:
            mine = [index for index, planned in chosen.items() if _lam(planned) == lam]
            if raw.out is not out:
                for place in mine:
                    raw.out[place] = out[place]
                    raw.lse[place] = lse[place]
            facts.tell(mine, raw.out, dropped, {i: chosen[i] for i in mine})
        return raw, made

    def decode(
        self,
        query: Any,
        pages: DevicePages,
        *,
        scale: float,
        causal: bool,
        left: int,
        lam: float,
    ) -> tuple[Any, Any, Any]:
        """See `adaattn_core.decoding.Decodes.decode`."""
        library = library_of(query)
        key, value, narrow, narrow_value = pages[:4]
        _, heads, count = pages.table.shape
        known_by = (
            library.layout(query), heads, key.shape, value.shape, pages.format,
            _rounded_up(pages.keys_max), scale, causal, left, lam,
        )  # fmt: skip
        known = self._steps.get(known_by)
        if known is None:
            known = self._first_step(query, pages, scale, causal, left, lam, library)
            self._steps.put(known_by, known)
        launch, device, shape = known
        out, lse, written = library.outputs(shape, "", query)
        dropped = library.empty(shape[:3], "f32", query)
        pointer = library.pointer
        launch.start(
            pointer(query), *written, pointer(dropped),
            PageAddresses(
                pointer(key), pointer(value), _four(pointer, narrow),
                _four(pointer, narrow_value), pointer(pages.table),
                (heads * count, count), pointer(pages.lengths), pointer(pages.starts),
            ),
            library.stream(device),
        )  # fmt: skip
        return out, lse, dropped

    def _first_step(
        self, query: Any, pages: DevicePages, scale: float, causal: bool, left: int, lam: float,
        library: Library,
    ) -> _Step:  # fmt: skip
        found = view(query)
        page_len, dim = (int(n) for n in pages.key.shape[1:])
        _check_sizes(found, found.dtype, dim, int(pages.value.shape[2]), page_len)
        batch, heads, len_q, _ = found.shape
        strides = (heads * len_q * dim, len_q * dim, dim, 1)
        rows = Rows(
            found.dtype, pages.format, pages.format, batch, heads, int(pages.table.shape[1]),
            len_q, dim, page_len, _rounded_up(pages.keys_max), causal, left, scale, lam,
            found.strides, strides, found.device,
        )  # fmt: skip
        return _Step(Decode(rows, library.stream(found.device)), found.device, found.shape)

    def _launch(
        self, problem: AttentionProblem, kv: PagedKV, query: Any, lam: float, stream: int
    ) -> Decode:
        mask, dim = problem.mask, problem.dim_qk
        code = kv.key_narrow.format if kv.key_narrow is not None else "i8"
        value_code = kv.value_narrow.format if kv.value_narrow is not None else code
        batch, heads, len_q, _ = query.shape
        strides = (heads * len_q * dim, len_q * dim, dim, 1)
        rows = Rows(
            problem.dtype, code, value_code, batch, heads, problem.heads_kv, len_q, dim,
            kv.page_len, _rounded_up(max(problem.len_kv, 1)), mask.right == 0,
            -1 if mask.left is None else mask.left, problem.scale, lam, query.strides, strides,
            query.device,
        )  # fmt: skip
        known = self._launches.get(rows)
        if known is None:
            known = Decode(rows, stream)
            self._launches.put(rows, known)
        return known


_NOWHERE = (0, 0, 0, 0)


def _four(
    pointer: Callable[[Any], int], parts: tuple[Any, ...] | None
) -> tuple[int, int, int, int]:
    """Addresses of the parts of narrow pages."""
    if parts is None:
        return _NOWHERE
    return pointer(parts[0]), pointer(parts[1]), pointer(parts[2]), pointer(parts[3])


def _rounded_up(keys: int) -> int:
    """Keys to plan for: up to an eighth more, so that a growing cache finds its launch."""
    step = max(1 << max(keys.bit_length() - 4, 0), CHUNK_KEYS)
    return -(-keys // step) * step


def _lam(head: HeadPlan) -> float:
    return head.structure.lam if isinstance(head.structure, ScoreSkip) else 0.0


def _check_head(index: HeadIndex, head: HeadPlan, problem: AttentionProblem) -> None:
    kind = head.structure.kind
    if kind not in STRUCTURES:
        raise UnsupportedError(
            got=f"structure {kind} over pages for sequence {index[0]}, head {index[1]}",
            needed=" or ".join(STRUCTURES),
            do='leave the policy out, or use backend="numpy"',
            structure=kind,
        )
    if head.qk != problem.dtype or head.pv != problem.dtype:
        raise UnsupportedError(
            got=f"qk={head.qk}, pv={head.pv} over pages of {problem.dtype}",
            needed=f"{problem.dtype} for both: 8-bit pages say so themselves",
            do='leave the formats to the policy, or use backend="numpy"',
        )


def _check_pages(problem: AttentionProblem, kv: PagedKV, query: ArrayView) -> None:
    if problem.mask.right not in (None, 0):
        raise UnsupportedError(
            got=f"a window with right={problem.mask.right} over pages",
            needed="causal rows, or rows that see every key",
            do='gather() the pages, or use backend="numpy"',
        )
    _check_sizes(query, problem.dtype, problem.dim_qk, problem.dim_v, kv.page_len)


def _check_sizes(query: ArrayView, dtype: str, dim_qk: int, dim_v: int, page_len: int) -> None:
    aligned = query.pointer % 16 == 0 and all(s % 8 == 0 for s in query.strides[:3])
    for fits, got, needed in (
        (dtype in ("bf16", "f16"), f"pages of {dtype}", "bf16 or f16"),
        (
            dim_qk == dim_v and dim_qk in DIMS,
            f"keys of dim {dim_qk}, values of dim {dim_v}",
            f"one dim out of {', '.join(map(str, DIMS))}",
        ),
        (page_len % CHUNK_KEYS == 0, f"page_len={page_len}", "a multiple of 64"),
        (query.shape[2] <= ROWS_MOST, f"{query.shape[2]} rows", f"at most {ROWS_MOST}"),
        (aligned and query.strides[3] == 1, "queries off the grid of 16 bytes",
         "a contiguous last axis, rows on 16 bytes"),
    ):  # fmt: skip
        if not fits:
            raise UnsupportedError(
                got=got, needed=needed, do='gather() the pages, or use backend="numpy"'
            )


def _addresses(kv: PagedKV, device: int) -> tuple[PageAddresses, driver.DeviceTable]:
    """Copy table and lengths to the device; also return what owns that memory."""
    parts = [np.asarray(x, np.int32) for x in (kv.table, kv.lengths, kv.starts)]
    table = driver.DeviceTable(b"".join(x.tobytes() for x in parts) or bytes(4), device)
    places = table.address + np.cumsum([0] + [x.nbytes for x in parts])

    def pool(pages: Pages | None) -> tuple[int, int, int, int]:
        if pages is None:
            return (0, 0, 0, 0)
        made = [pointer_of(x) for x in (pages.data, pages.unit, pages.centre, pages.reach)]
        return made[0], made[1], made[2], made[3]

    _, heads, pages = kv.table.shape
    found = PageAddresses(
        pointer_of(kv.key.data), pointer_of(kv.value.data), pool(kv.key_narrow),
        pool(kv.value_narrow), int(places[0]), (heads * pages, pages), int(places[1]),
        int(places[2]),
    )  # fmt: skip
    return found, table
