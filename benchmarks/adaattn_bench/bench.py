"""``adaattn bench``: times, rates, memory and errors of everybody, problem by problem."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from adaattn_bench.clock import Timings, kept_when_interrupted, reason, take_turns
from adaattn_bench.contenders import Contender, Field, Given, gather
from adaattn_bench.devices import PeakMemory, Rates, Utilization, describe, measure_rates
from adaattn_bench.facts import facts_of
from adaattn_bench.problems import DTYPES, Shape, make_problem
from adaattn_bench.statistics import rounded
from adaattn_bench.truth import Truth

Note = Callable[[str], Any]
"""Told what is done next, and when a problem is done ("")."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how.

    Attributes
    ----------
    device, dtype, source : str
        Where, in which format, and on what (`make_problem`).
    lengths, dims : tuple of int
        Keys, and head dimensions.
    budgets : tuple of float
    peers : tuple of str
    heads_q, heads_kv, batch : int
    tokens : int or None
        Query rows, the last of the sequence; None: all.
    rounds : int
    burst_ms : float
    truth_rows : int
        Rows whose error is measured against float64, at least.
    seconds : float
        Begin nothing later.
    seed : int
    """

    device: str
    dtype: str
    source: str
    lengths: tuple[int, ...]
    dims: tuple[int, ...]
    budgets: tuple[float, ...]
    peers: tuple[str, ...]
    heads_q: int
    heads_kv: int
    batch: int = 1
    tokens: int | None = None
    rounds: int = 3
    burst_ms: float = 100.0
    truth_rows: int = 256
    seconds: float = 600.0
    seed: int = 0

    def shapes(self) -> list[Shape]:
        """Sizes of all problems, short ones first."""
        return [
            Shape(
                self.batch, self.heads_q, self.heads_kv,
                length if self.tokens is None else min(self.tokens, length), length, dim,
            )
            for length in sorted(self.lengths)
            for dim in self.dims
        ]  # fmt: skip


def sweep(settings: Settings, note: Note = lambda _: None) -> dict[str, Any]:
    """Measure everything; Ctrl-C ends it early with what there is.

    Returns
    -------
    dict
        ``machine``, ``rates``, ``settings``, ``cells`` (one a problem) and ``cut_short``: what
        was not measured, and why.
    """
    deadline = time.monotonic() + settings.seconds
    report: dict[str, Any] = {
        "kind": "bench",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(settings.device),
        "settings": asdict(settings),
        "rates": {},
        "cells": [],
        "cut_short": [],
    }
    todo = settings.shapes()
    with kept_when_interrupted(report):
        note("this machine's rates")
        rates = measure_rates(settings.device, settings.dtype)
        report["rates"] = asdict(rates)
        note("")
        while todo:
            shape = todo[0]
            if time.monotonic() > deadline:
                break
            note(f"{shape.len_kv:,} tokens, dim {shape.dim}")
            for cell in _cell(settings, shape, rates, note):
                _keep(report["cells"], cell)
            todo.pop(0)
            note("")
    why = "interrupted" if report["interrupted"] else "no time left"
    report["cut_short"] = [f"{s.len_kv} tokens, dim {s.dim}: {why}" for s in todo]
    kept: dict[str, Any] = rounded(report)
    return kept


def _keep(cells: list[dict[str, Any]], cell: dict[str, Any]) -> None:
    """Put a cell in the place of its earlier, less complete self."""
    if cells and cells[-1]["shape"] == cell["shape"]:
        cells[-1] = cell
    else:
        cells.append(cell)


def _cell(
    settings: Settings, shape: Shape, rates: Rates, note: Note
) -> Iterator[dict[str, Any]]:
    """Yield the same problem's figures round after round, each time with more behind them."""
    problem = make_problem(settings.source, shape, settings.dtype, seed=settings.seed)
    given = Given.on(problem, settings.device)
    field = gather(given, settings.budgets, settings.peers)
    truth = Truth.draw(given, settings.truth_rows, settings.seed)
    entries = {}
    for name, contender in field.found.items():
        note(f"{shape.len_kv:,} tokens, dim {shape.dim}: {name}")
        try:
            entries[name] = _entry(contender, truth, settings)
        except Exception as error:  # whoever fails leaves the field; the others go on
            field.absent[name] = reason(error)
    timings = Timings(cold={n: field.found[n].cold_ms for n in entries})
    bursts = {name: field.found[name].burst for name in entries}
    yield _figures(settings, shape, rates, field, entries, timings)
    for turn in range(settings.rounds):
        note(f"{shape.len_kv:,} tokens, dim {shape.dim}: round {turn + 1}")
        take_turns(bursts, 1, settings.burst_ms, timings=timings, seed=settings.seed + turn)
        for name in timings.failed.keys() & bursts.keys():
            bursts.pop(name)
        yield _figures(settings, shape, rates, field, entries, timings)


def _entry(contender: Contender, truth: Truth, settings: Settings) -> dict[str, Any]:
    """Everything of one contender but its times."""
    with PeakMemory(settings.device) as memory:
        result = contender.call()
    entry: dict[str, Any] = {
        "errors": truth.errors(contender.out_of(result)),
        "peak_bytes": None if contender.own_memory else memory.bytes,
    }
    if hasattr(result, "certificate"):
        entry["facts"] = facts_of(result)
    busy = Utilization(settings.device)
    if settings.device == "cuda":
        (warm,) = contender.burst(1)[-1:]
        with busy:
            contender.burst(max(3, int(1e3 * busy.SECONDS / max(warm, 1e-2))))
    return entry | {"busy_percent": busy.percent, "watts": busy.watts}


def _figures(
    settings: Settings,
    shape: Shape,
    rates: Rates,
    field: Field,
    entries: Mapping[str, dict[str, Any]],
    timings: Timings,
) -> dict[str, Any]:
    item = np.dtype(DTYPES[settings.dtype]).itemsize
    cell: dict[str, Any] = {
        "shape": asdict(shape),
        "source": settings.source,
        "visible": shape.visible,
        "cache_bytes": shape.cache_bytes(item),
        "traffic_bytes": shape.traffic_bytes(item),
        "contenders": {},
        "absent": field.absent | timings.failed,
    }
    summaries = timings.summaries()
    for name, entry in entries.items():
        found = entry | {"cold_ms": timings.cold.get(name)}
        if name in summaries:
            seconds = summaries[name].median / 1e3
            share = statistics.fmean(entry["facts"]["share"]) if "facts" in entry else 1.0
            computed = share * shape.flops / seconds
            bandwidth = shape.traffic_bytes(item) / seconds
            found |= {
                "ms": summaries[name].to_json(),
                "tokens_per_second": shape.batch * shape.len_q / seconds,
                "tflops": computed / 1e12,
                "tflops_dense": shape.flops / seconds / 1e12,
                "matmul_share": computed / rates.matmul,
                "bandwidth": bandwidth,
                "copy_share": bandwidth / rates.copy,
            }
        cell["contenders"][name] = found
    return cell
