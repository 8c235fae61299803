"""``adaattn bench``: what it measures, what it keeps, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import typer

from adaattn_bench import bench as benching
from adaattn_bench import clock, contenders, devices
from adaattn_bench.again import BENCH, command_of
from adaattn_bench.bench import Settings, sweep
from adaattn_bench.bench_figures import markdown, page
from adaattn_bench.clock import take_turns
from adaattn_bench.contenders import Given
from adaattn_bench.devices import PeakMemory, Utilization, measure_rates
from adaattn_bench.problems import DTYPES, Shape, make_problem
from adaattn_bench.statistics import Summary, rounded
from adaattn_bench.truth import Truth, exact_rows
from adaattn_core.cli.app import build_app
from adaattn_core.errors import ArgumentError

SMALL = (
    "bench", "--device", "cpu", "--lengths", "64,128", "--dims", "16", "--heads", "4:2",
    "--rounds", 1, "--burst-ms", 0, "--truth-rows", 32,
)  # fmt: skip


def three_lines(text: str) -> bool:
    return len(text.strip().splitlines()) == 3


@pytest.fixture
def small() -> Settings:
    return Settings(
        device="cpu", dtype="float32", source="local", lengths=(64, 96), dims=(16,),
        budgets=(0.2,), peers=(), heads_q=2, heads_kv=1, rounds=2, burst_ms=0.0, truth_rows=16,
    )  # fmt: skip


# --- the command ------------------------------------------------------------------------------
def test_every_contender_has_times_rates_memory_and_errors(cli: Any, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    code, out, err = cli(
        *SMALL, "--budgets", "0.1,0.2", "--peers", "torch flash,SageAttention",
        "--out", tmp_path / "out", "--report", page, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [c["shape"]["len_kv"] for c in report["cells"]] == [64, 128]
    for cell in report["cells"]:
        names = {"budget 0.1", "budget 0.2", "exact", "torch flash"}
        assert set(cell["contenders"]) == names
        assert set(cell["absent"]) == {"SageAttention"}
        assert cell["cache_bytes"] == 2 * 2 * cell["shape"]["len_kv"] * 16 * 4
        for name, entry in cell["contenders"].items():
            assert entry["ms"]["low"] <= entry["ms"]["median"] <= entry["ms"]["high"]
            assert entry["cold_ms"] > 0
            seconds = entry["ms"]["median"] / 1e3
            rows = cell["shape"]["len_q"]
            assert entry["tokens_per_second"] == pytest.approx(rows / seconds, rel=1e-3)
            assert entry["matmul_share"] == pytest.approx(
                entry["tflops"] * 1e12 / report["rates"]["matmul"], rel=1e-3
            )
            # Float32 sums of up to 128 terms; budgets promise 0.1 and 0.2 of most rows.
            limit = float(name.split()[1]) if name.startswith("budget") else 1e-4
            assert statistics.median(entry["errors"]["rows"]) <= limit
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written == report
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text.count("| torch flash |") == 2
    assert "not here: SageAttention" in text
    assert page.read_text().count("<svg") == 4
    assert page.read_text().index("<svg") < page.read_text().index("<table")


def test_a_page_says_the_command_that_repeats_it(cli: Any, small: Settings) -> None:
    report = sweep(small)
    command = command_of(report)
    assert f"$ {command}" in markdown(report)
    words = command.split()
    assert words[:2] == ["adaattn", "bench"]
    code, out, _ = cli(
        *words[1:], "--peers", "none", "--burst-ms", 0, "--truth-rows", 16, "--json"
    )
    assert code == 0
    again = json.loads(out)["settings"]
    assert {n: again[n] for n in BENCH} == {n: report["settings"][n] for n in BENCH}
    decoding = {**report, "settings": {**report["settings"], "tokens": 1, "budgets": []}}
    assert command_of(decoding).endswith("--budgets none --rounds 2 --seed 0")


def test_the_table_names_everybody_and_the_cache(cli: Any) -> None:
    code, out, _ = cli(*SMALL, "--budgets", "none", "--peers", "none")
    assert code == 0
    assert re.search(
        r"64 tokens, 1 x 4 heads \(2 of keys\), dim 16; keys and values 0.02 MB", out
    )
    assert len(re.findall(r"^exact +", out, re.M)) == 2
    assert "…" not in out


def test_decoding_is_measured_on_shipped_heads(cli: Any) -> None:
    options = ("--data", "demo", "--lengths", "512", "--tokens", 1, "--rounds", 1)
    code, out, _ = cli(
        "bench", "--device", "cpu", *options, "--burst-ms", 0, "--budgets", "none", "--json"
    )
    assert code == 0
    (cell,) = json.loads(out)["cells"]
    assert cell["visible"] == 512
    assert cell["shape"]["heads_q"] == 3
    assert max(cell["contenders"]["torch flash"]["errors"]["worst"]) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        ("--lengths", "many"), ("--lengths", "0"), ("--dims", "-3"), ("--budgets", "0"),
        ("--budgets", "nan"), ("--heads", "4:3"), ("--heads", "1:1:1"), ("--dtype", "int8"),
        ("--peers", "FlashAttention-9"), ("--device", "tpu"), ("--device", "cuda"),
        ("--data", "no-such-file.npz"), ("--data", "demo", "--lengths", "9000"),
        ("--data", "demo", "--dims", "128"), ("--report", "no/such/folder/page.html"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_end_in_three_lines(cli: Any, options: tuple[str, ...]) -> None:
    base = ("bench", "--rounds", 1, "--burst-ms", 0, "--budgets", "none", "--peers", "none")
    code, out, err = cli(*base, *options)
    assert (code, out) == (2, "")
    assert three_lines(err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_what_there_is(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    honest = benching.take_turns

    def impatient(*arguments: Any, **options: Any) -> Any:
        if len(seen) == 1:
            signal.raise_signal(number)
        seen.append(1)
        return honest(*arguments, **options)

    seen: list[int] = []
    monkeypatch.setattr(benching, "take_turns", impatient)
    code, out, _ = cli(*SMALL, "--budgets", "none", "--out", tmp_path, "--json")
    assert code == 128 + number
    report = json.loads(out)
    assert report["interrupted"] == number
    first, second = report["cells"]
    assert "ms" in first["contenders"]["exact"]
    assert "ms" not in second["contenders"]["exact"]
    assert report["cut_short"] == ["128 tokens, dim 16: interrupted"]
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert "not measured: 128 tokens" in (tmp_path / "bench.md").read_text()


def test_every_option_is_in_the_reference() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/reference/cli.md").read_text("utf-8")
    group: Any = typer.main.get_command(build_app())
    for command in ("bench",):
        (section,) = (
            s
            for s in re.split(r"^## ", text, flags=re.M)
            if s.startswith(f"`adaattn {command}")
        )
        names = [
            o for p in group.commands[command].params for o in (*p.opts, *p.secondary_opts)
        ]
        missing = [n for n in names if n.startswith("--") and f"`{n}`" not in section]
        assert not missing


# --- what is measured -------------------------------------------------------------------------
def test_nothing_is_begun_after_the_deadline(small: Settings) -> None:
    settings = Settings(**{n: getattr(small, n) for n in small.__slots__} | {"seconds": 0.0})
    report = sweep(settings)
    assert report["cells"] == []
    assert report["cut_short"] == [f"{n} tokens, dim 16: no time left" for n in (64, 96)]
    assert "not measured: 64 tokens" in markdown(report)
    assert "<svg" not in page(report)


def test_who_fails_leaves_the_field(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: Any) -> Any:
        raise ValueError("not on\nthis machine")

    def weary(given: Any) -> Any:
        calls = iter(range(2))  # one cold, one to measure memory
        return lambda: np.zeros(given.problem.query.shape, np.float32) + next(calls)

    monkeypatch.setitem(contenders.PEERS, "broken", broken)
    monkeypatch.setitem(contenders.PEERS, "weary", weary)
    fields = {n: getattr(small, n) for n in small.__slots__}
    report = sweep(Settings(**fields | {"peers": ("broken", "weary"), "lengths": (64,)}))
    (cell,) = report["cells"]
    assert cell["absent"]["broken"] == "ValueError: not on this machine"
    assert "weary" in cell["absent"]
    assert "ms" in cell["contenders"]["exact"]
    assert "ms" not in cell["contenders"].get("weary", {})


def test_a_wrong_output_is_a_large_error(small: Settings) -> None:
    problem = make_problem("local", small.shapes()[0], "float32")
    drawn = Truth.draw(Given.on(problem, "cpu"), 16, 0)
    assert max(drawn.errors(truth_out(problem))["worst"]) < 1e-6
    assert min(drawn.errors(2 * truth_out(problem))["rows"]) > 0.2
    assert drawn.errors(np.full_like(truth_out(problem), np.nan))["worst"][0] == math.inf


def truth_out(problem: Any) -> Any:
    q, k, v = (np.float64(x) for x in (problem.query, problem.key, problem.value))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    ends = (
        np.arange(k.shape[2])[None, :] > np.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    )
    scores[..., ends] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("len_q", [1, 7, 16])
def test_counts_are_those_of_the_mask(len_q: int) -> None:
    shape = Shape(2, 4, 2, len_q, 16, 8)
    rows = np.arange(16 - len_q, 16)
    assert shape.visible == int((rows + 1).sum())
    assert shape.flops == 2 * 4 * shape.visible * (2 * 8 + 2 * 8)
    assert shape.cache_bytes(2) == 2 * (2 * 2 * 16 * 8) * 2
    problem = make_problem("normal", shape, "float32")
    assert problem.shape == shape
    drawn = Truth.draw(Given.on(problem, "cpu"), len_q, 0)
    assert max(drawn.errors(truth_out(problem))["worst"]) < 1e-6


@pytest.mark.parametrize("source", ["local", "normal", "sink"])
def test_drawn_heads_are_the_same_again_and_finite(source: str) -> None:
    shape = Shape(1, 2, 1, 32, 64, 8)
    for dtype, kind in DTYPES.items():
        first, second = (make_problem(source, shape, dtype, seed=3) for _ in "ab")
        assert first.query.dtype == kind
        for a, b in zip(*((p.query, p.key, p.value) for p in (first, second)), strict=True):
            assert np.array_equal(a.astype(np.float32), b.astype(np.float32))
            assert np.isfinite(a.astype(np.float32)).all()


def test_tensors_hold_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    problem = make_problem("normal", Shape(1, 2, 1, 8, 8, 4), "bfloat16")
    query = problem.tensors("cpu")[0]
    assert query.dtype == torch.bfloat16
    bits = query.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert np.array_equal(bits.astype(np.float32), problem.query.astype(np.float32))


def test_a_file_without_these_sizes_is_refused() -> None:
    with pytest.raises(ArgumentError, match="at most 8192 tokens, 3 query and 1 key heads"):
        make_problem("demo", Shape(1, 3, 1, 8193, 8193, 64), "float32")


# --- clocks and statistics --------------------------------------------------------------------
def test_medians_follow_what_calls_take() -> None:
    def sleeper(seconds: float) -> Any:
        return clock.by_host(lambda: time.sleep(seconds))

    found = take_turns({"long": sleeper(0.02), "short": sleeper(0.002)}, 2, 10.0)
    times = found.summaries()
    assert times["long"].median >= 20
    assert times["long"].median > times["short"].median
    assert set(found.cold) == {"long", "short"}


def test_times_until_return_are_of_each_call() -> None:
    found = clock.until_return({"slow": lambda: time.sleep(0.01), "fast": int}, 2, 5)
    assert found["slow"] > 1e4 > found["fast"]


def test_each_contender_has_a_cold_call_of_its_own() -> None:
    counts = {"a": 0}

    def burst(count: int) -> list[float]:
        counts["a"] += count
        return [1.0 if counts["a"] > 1 else 99.0] * count

    found = take_turns({"a": burst}, 1, 0.0)
    assert found.cold == {"a": 99.0}
    assert found.summaries()["a"].high == 1.0


def test_summaries_are_order_statistics() -> None:
    summary = Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.median, summary.low, summary.high, summary.count) == (3.0, 1.0, 5.0, 5)
    assert (summary.first_quartile, summary.third_quartile) == (2.0, 4.0)
    assert summary.spread == pytest.approx(2 / 3)
    assert Summary.of([7.0]).spread == 0.0


def test_reports_are_strict_json() -> None:
    body = rounded({"a": math.inf, "b": [np.float32(1.23456789)], 3: np.int64(4), "c": True})
    assert body == {"a": None, "b": [1.2346], "3": 4, "c": True}
    json.dumps(body, allow_nan=False)


def test_memory_of_a_large_array_is_seen() -> None:
    with PeakMemory("cpu") as memory:
        np.ones(1 << 23).sum()  # 64 MiB
    if memory.bytes is None:
        pytest.skip("this system does not say")
    assert 60e6 < memory.bytes < 120e6


def test_rates_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benching.measure_rates.__globals__["MATMUL_SIZE"], "cpu", 128)
    monkeypatch.setitem(benching.measure_rates.__globals__["COPY_BYTES"], "cpu", 1 << 20)
    rates = measure_rates("cpu", "float32")
    assert 1e7 < rates.matmul < 1e14
    assert 1e7 < rates.copy < 1e13


def test_both_ways_to_the_truth_agree() -> None:
    pytest.importorskip("torch")
    problem = make_problem("local", Shape(2, 4, 2, 24, 40, 16), "bfloat16", seed=2)
    given, rows = Given.on(problem, "cpu"), np.array([0, 5, 23])
    tensors = dataclasses.replace(given, arrays=given.tensors)
    assert given.arrays is not given.tensors
    ways = [exact_rows(one, rows) for one in (given, tensors)]
    assert np.abs(ways[0] - ways[1]).max() < 1e-12


def test_errors_are_relative_to_the_whole_output(small: Settings) -> None:
    """Certificates speak of the rms row of all rows, not of those drawn."""
    problem = make_problem("local", small.shapes()[0], "float32")
    exact = truth_out(problem)
    some = Truth.draw(Given.on(problem, "cpu"), 4, 0)
    rows = np.setdiff1d(np.arange(64), some.rows)
    louder = exact.copy()
    louder[:, :, rows] *= 1000
    louder[:, :, some.rows] *= 1.5
    assert max(some.errors(louder)["worst"]) < 0.01


class FakeNvml:
    """Half busy, 300 watts."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def nvmlDeviceGetUtilizationRates(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.gpu = 50
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = int(1e3 * 300 * (time.perf_counter() - self.started))
        return 0


def test_utilisation_is_what_nvml_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_nvml", lambda: (FakeNvml(), None))
    with Utilization("cuda") as busy:
        time.sleep(Utilization.SECONDS)
    assert busy.percent == 50
    assert busy.watts == pytest.approx(300, rel=0.2)
    with Utilization("cuda") as brief:
        pass
    assert (brief.percent, brief.watts) == (None, None)
