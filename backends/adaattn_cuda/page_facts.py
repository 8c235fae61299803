"""Facts of a run over pages, for theorem 11: worked out on the host when somebody looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from adaattn_core.bounds import largest_norm_upper, rms_norm_lower
from adaattn_core.bounds.rounding import add_up, mul_up
from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_core.facts import RunFacts
from adaattn_core.paged import PagedKV
from adaattn_core.pages import CODE_UNIT, Pages
from adaattn_core.plan import HeadPlan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ITEM_BYTES, view
from adaattn_cuda.facts import kernel_arithmetic
from adaattn_cuda.tuning.smxx_attn_decode import CHUNK_KEYS

__all__ = ["PageFacts", "pointer_of"]

_F16_TWICE = 2.0**-10
"""Queries over narrow pages are rounded to f16 twice."""


class PageFacts(MutableMapping[HeadIndex, RunFacts]):
    """Facts of a run over pages, worked out on the host when one is read.

    That copies pages, queries and output: budgets over pages are for looking closely, not for
    every step. What was written since the run is noticed, and refused.
    """

    def __init__(self, problem: AttentionProblem) -> None:
        self._problem = problem
        self._runs: dict[HeadIndex, tuple[Any, Any, HeadPlan]] = {}
        self._told: dict[HeadIndex, RunFacts] = {}
        self._versions = _versions(problem)
        self._out_version: Any = None
        self._host: Any = None

    def tell(
        self,
        heads: list[HeadIndex],
        out: Any,
        dropped: Any,
        plans: Mapping[HeadIndex, HeadPlan],
    ) -> None:
        """Note that heads were run (again)."""
        self._out_version = getattr(out, "_version", None)
        for index in heads:
            self._runs[index] = (out, dropped, plans[index])
            self._told.pop(index, None)

    def __getitem__(self, index: HeadIndex) -> RunFacts:
        if index not in self._told:
            out, dropped, plan = self._runs[index]
            self._told[index] = self._facts(index, out, dropped, plan)
        return self._told[index]

    def __setitem__(self, index: HeadIndex, facts: RunFacts) -> None:
        self._told[index] = facts

    def __delitem__(self, index: HeadIndex) -> None:
        self._runs.pop(index, None)
        self._told.pop(index, None)

    def __iter__(self) -> Iterator[HeadIndex]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def _read(self) -> tuple[PagedKV, NDArray[Any], NDArray[Any], NDArray[Any]]:
        if self._host is None:
            if _versions(self._problem) != self._versions:
                raise _written("pages or queries")
            kv = cast(PagedKV, self._problem.paged)
            host = _host_pages(kv)
            self._host = (host, *host.gather(), _to_host(self._problem.query))
        return cast("tuple[PagedKV, Any, Any, Any]", self._host)

    def _facts(self, index: HeadIndex, out: Any, dropped: Any, plan: HeadPlan) -> RunFacts:
        p, (sequence, head) = self._problem, index
        if getattr(out, "_version", None) != self._out_version:
            raise _written("the output")
        kv, key, value, query = self._read()
        start, stop = p.intervals(sequence)
        seen = stop > start
        if not seen.any():
            return RunFacts.of_nothing()
        low, high = int(start[seen].min()), int(stop[seen].max())
        kv_head = head // p.group_size
        k, v = (x[sequence, kv_head, low:high].astype(np.float64) for x in (key, value))
        rows = query[sequence, head][seen].astype(np.float64)
        returned = _to_host(out)[sequence, head].astype(np.float64)
        lost = float(_to_host(dropped)[sequence, head].max(initial=0.0))
        residuals = kv.residuals(sequence, kv_head)
        entries = kv.used_pages(sequence, kv_head)
        narrow = entries[entries >= 0]
        norms = [largest_norm_upper(x) for x in (rows, k, v)]
        rounded = 0.0
        if len(narrow):
            # Sums over narrow pages are of centre and code apart: larger than the vectors are.
            for side, pool in ((1, kv.key_narrow), (2, kv.value_narrow)):
                norms[side] = max(norms[side], _largest_parts(cast(Pages, pool), narrow))
            rounded = norms[0] * (_F16_TWICE * 1.01) + math.sqrt(p.dim_qk) * 2.0**-24 * norms[0]
        size = rms_norm_lower(returned)
        finite = math.isfinite(size)
        arithmetic = kernel_arithmetic(plan.qk, plan.pv, p.dim_qk, high - low, CHUNK_KEYS)
        return RunFacts(
            # Merging warps, and splits, are two more steps of the softmax.
            keys_max=int((stop - start).max()) + 2 * CHUNK_KEYS,
            query_norm_upper=norms[0],
            key_norm_upper=float(add_up(norms[1], residuals[0])),
            value_norm_upper=float(add_up(norms[2], residuals[1])),
            query_residual_upper=rounded,
            key_residual_upper=residuals[0],
            value_residual_upper=residuals[1],
            value_diameter_upper=float(
                add_up(2.0 * largest_norm_upper(v - v.mean(axis=0)), mul_up(2.0, residuals[1]))
            ),
            score_residual_upper=0.0,
            # Sums of f32 weights, each within 2^-21: far less than this.
            dropped_mass_upper=lost * (1 + 2.0**-8),
            bias_max_abs=0.0,
            arithmetic=replace(arithmetic, step_keys=CHUNK_KEYS),
            output_rms=size if finite else 0.0,
            nonfinite=not finite,
        )


def _written(what: str) -> AdaAttnError:
    return AdaAttnError(
        got=f"{what} written to since the run",
        needed="what the run read and returned",
        do="look at the certificate before the cache grows",
    )


def _largest_parts(pool: Pages, pages: NDArray[Any]) -> float:
    """Upper bound of ``|centre| + |reach * code|`` as vectors, over some pages."""
    unit = np.asarray(pool.unit)[pages, None].astype(np.float64)
    most = 448.0 if pool.format == "e4m3" else 128.0
    reach = np.asarray(pool.reach)[pages].astype(np.float64) * (most / CODE_UNIT[pool.format])
    return largest_norm_upper(unit * (np.abs(np.asarray(pool.centre)[pages]) + reach))


def _versions(problem: AttentionProblem) -> tuple[Any, ...]:
    """Counters of writes to a problem's arrays, where their library has them (torch)."""
    kv = cast(PagedKV, problem.paged)
    pools = (kv.key, kv.value, kv.key_narrow, kv.value_narrow)
    arrays = [problem.query, *(x for pool in pools if pool for x in pool.arrays())]
    return tuple(getattr(x, "_version", None) for x in arrays)


def _to_host(x: Any) -> NDArray[Any]:
    """Copy a CUDA array of any layout to NumPy; bf16 as float32."""
    found = view(x)
    span = 1 + sum((n - 1) * s for n, s in zip(found.shape, found.strides, strict=True))
    if not math.prod(found.shape):
        return np.zeros(found.shape, np.float32)
    raw = driver.read(found.pointer, span * ITEM_BYTES[found.dtype], found.device)
    kind = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[found.dtype]
    flat = np.frombuffer(raw, kind)
    strides = tuple(s * flat.itemsize for s in found.strides)
    array = np.lib.stride_tricks.as_strided(flat, found.shape, strides)
    if found.dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.copy()


def _raw_to_host(x: Any, dtype: Any, device: int) -> NDArray[Any]:
    shape = tuple(int(n) for n in x.shape)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = driver.read(pointer_of(x), size, device) if size else b""
    return np.frombuffer(raw, dtype).reshape(shape)


def _host_pages(kv: PagedKV) -> PagedKV:
    """Return the same cache in host memory, wide pages as float32."""
    device = view(kv.key.data).device

    def narrow(pool: Pages | None) -> Pages | None:
        if pool is None:
            return None
        code = np.int8 if pool.format == "i8" else np.uint8
        return Pages(
            _raw_to_host(pool.data, code, device), pool.format,
            _raw_to_host(pool.unit, np.float32, device),
            _raw_to_host(pool.centre, np.float16, device),
            _raw_to_host(pool.reach, np.float16, device),
            _raw_to_host(pool.residual_upper, np.float32, device),
        )  # fmt: skip

    key, value = (Pages(_to_host(pool.data), "f32") for pool in (kv.key, kv.value))
    return replace(
        kv, key=key, value=value, key_narrow=narrow(kv.key_narrow),
        value_narrow=narrow(kv.value_narrow), dtype="f32", device="cpu",
    )  # fmt: skip


def pointer_of(x: Any) -> int:
    """Return the address of an array that must lie in one piece."""
    if hasattr(x, "data_ptr"):
        whole, pointer = x.is_contiguous(), int(x.data_ptr())
    else:
        interface = x.__cuda_array_interface__
        whole, pointer = interface.get("strides") is None, int(interface["data"][0])
    if not whole or pointer % 16:
        raise UnsupportedError(
            got="a pool of pages with gaps, or not on 16 bytes",
            needed="contiguous pages",
            do="allocate pools as whole arrays",
        )
    return pointer
