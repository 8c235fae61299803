"""What a budget gains on a GPU: speed, kept share, certificates and their truth on real heads.

    python benchmarks/gpu_capture.py ... --out DATA          queries, keys, values of a model
    python benchmarks/gpu_adaptive.py --data DATA --out DIR  writes gpu_adaptive.json
    python benchmarks/gpu_adaptive.py --render FILE.json     table and plots of an earlier run
    python benchmarks/gpu_adaptive.py --join FILE.json ... --out DIR     several runs as one
                                      [--peers-of FILE.json]  with peers of an earlier one
                                      [--rest-of FILE.json]   with problems that were left out

Everything is inside the timed region: probe, plan, gather, attend, certify, escalate; inputs
are warm on the device. Contenders take turns in random order; figures are medians of CUDA
events around single calls. The truth is exact attention in float64 on rows that no certificate
drew. What was measured is written after every problem, and nothing new is begun after
--seconds: a run that is cut short still reports.

On a machine without a GPU, --device cpu runs the same code over the NumPy backend.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

import adaptive_cases
import adaptive_plots
import adaptive_report
from adaattn_bench.clock import replays
from adaattn_bench.devices import describe
from adaattn_bench.statistics import rounded
from adaattn_bench.truth import Truth
from adaptive_data import CUDNN, DENSE
from adaptive_measure import Settings, line, measure
from adaptive_peers import NAMES, Heads, contenders

BATCHES = ((1, 13, 25), (5, 17, 29))
"""Layers that run together as one problem with three times the heads."""
SECTIONS = ("heads", "hard", "needles", "graphs")
HARD_ROWS = 1024


class Run:
    """One measurement: its settings, its deadline, and the report as it grows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.seconds
        self.settings = Settings(
            budgets=tuple(options.budgets),
            peers=tuple(options.peers),
            rounds=options.rounds,
            burst_ms=options.burst_ms,
            whole_repeats=3,
        )
        self.report: dict[str, Any] = self._header()
        torch.manual_seed(17)

    def _header(self) -> dict[str, Any]:
        options = self.options
        return {
            **describe(options.device),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": "python benchmarks/gpu_adaptive.py",
            "revision": options.revision,
            "rounds": options.rounds,
            "burst_ms": options.burst_ms,
            "rows": options.rows,
            "budgets": options.budgets,
            "captures": [],
            "cells": [],
            "hard": [],
            "needles": [],
            "graphs": [],
            "cut_short": [],
        }

    def time_left(self, what: str) -> bool:
        """Whether something new may be begun; if not, the report says what was left out."""
        if time.monotonic() < self.deadline:
            return True
        self.report["cut_short"].append(what)
        print("no time left for", what, flush=True)
        return False

    def write(self) -> None:
        """Write what is known so far; the file appears whole or not at all."""
        path = self.options.out / "gpu_adaptive.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rounded(self.report)))
        part.replace(path)

    def captures(self) -> Iterator[tuple[str, int, Path]]:
        """Text, length and file of every capture asked for, texts in turn, short ones first."""
        for text in self.options.texts:
            for length in self.options.lengths:
                path = self.options.data / f"qkv-{length}-{text}.pt"
                if path.exists():
                    yield text, length, path
                else:
                    self.report["cut_short"].append(f"no {path.name}")

    def layers(self, path: Path) -> tuple[dict[int, Heads], float]:
        """Layers of a capture, on the device, and the perplexity noted with them."""
        taken = torch.load(path, mmap=True, weights_only=True)
        device = self.options.device
        return {
            layer: Heads(*(arrays[name][None].to(device) for name in "qkv"))
            for layer, arrays in taken["layers"].items()
        }, float(taken["perplexity"])

    # --- sections -----------------------------------------------------------------------------
    def heads(self, text: str, length: int, path: Path) -> None:
        """Every layer of one capture alone, then three together."""
        layers, perplexity = self.layers(path)
        self.report["captures"].append({"text": text, "len": length, "perplexity": perplexity})
        truths = {}
        for layer, heads in layers.items():
            if not self.time_left(f"{text} {length} layer {layer}"):
                return
            # The same rows in every layer.
            truths[layer] = Truth.draw(heads.given, self.options.rows, seed=length)
            self._cell("cells", heads, truths[layer], text=text, layers=[layer])
        for batch in BATCHES:
            if not truths.keys() >= set(batch):
                continue
            if not self.time_left(f"{text} {length} layers {batch}"):
                return
            sets = [layers[layer] for layer in batch]
            together = Heads(
                *(torch.cat([getattr(h, name) for h in sets], 1) for name in ("q", "k", "v"))
            )
            truth = Truth.joined([truths[layer] for layer in batch])
            self._cell("cells", together, truth, text=text, layers=list(batch))

    def _cell(self, section: str, heads: Heads, truth: Any, **facts: Any) -> None:
        cell = facts | measure(heads, truth, self.settings)
        self.report[section].append(cell)
        size = f"{heads.length} x {heads.count} x {cell['dim']}:"
        print(*facts.values(), size, line(cell), flush=True)
        self.write()

    def hard(self) -> None:
        """Synthetic inputs, against our own dense kernel and cuDNN."""
        options = self.options
        peers = tuple(name for name in (CUDNN, DENSE) if name in options.peers)
        whole, self.settings = self.settings, replace(self.settings, peers=peers)
        problems = adaptive_cases.problems(options.unit, options.device, torch.bfloat16)
        for name, dim, length, make in problems:
            if length > max(options.lengths):
                continue
            if not self.time_left(f"{name} {dim} {length}"):
                break
            heads = make()
            truth = Truth.draw(heads.given, min(HARD_ROWS, options.rows), seed=length)
            self._cell("hard", heads, truth, case=name)
        self.settings = whole

    def needles(self) -> None:
        """Planted keys, in the longest capture of the first text."""
        captures = [c for c in self.captures() if c[0] == self.options.texts[0]]
        if not captures or not self.time_left("needles"):
            return
        layers, _ = self.layers(captures[-1][2])
        rel = self.options.budgets[0]
        found = adaptive_cases.needles(list(layers.values()), rel, HARD_ROWS, seed=31)
        self.report["needles"].append(found)
        print("needles", found, flush=True)
        self.write()

    def graphs(self) -> None:
        """Replay CUDA graphs of single calls: the device's time without the host's."""
        if self.options.device != "cuda":
            return
        peers = [name for name in (CUDNN, DENSE) if name in self.options.peers]
        for text, length, path in self.captures():
            if text != self.options.texts[0] or not self.time_left(f"graphs {length}"):
                continue
            layers, _ = self.layers(path)
            for layer, heads in layers.items():
                found, _ = contenders(heads, list(self.options.budgets), peers)
                entry: dict[str, Any] = {"text": text, "len": length, "layer": layer}
                for name, contender in found.items():
                    try:
                        entry[name] = replays(contender.call, 5)
                    except Exception as error:  # a call that cannot be captured says so
                        entry.setdefault("missing", {})[name] = str(error)[:300]
                        torch.cuda.synchronize()
                self.report["graphs"].append(entry)
                print("graph", entry, flush=True)
                self.write()

    def everything(self) -> None:
        """Run all sections, the most telling first."""
        tasks: list[tuple[str, Callable[[], None]]] = []
        for text, length, path in self.captures():
            tasks.append(("heads", lambda t=text, n=length, p=path: self.heads(t, n, p)))
        first = sum(text == self.options.texts[0] for text, _, _ in self.captures())
        tasks[first:first] = [("needles", self.needles), ("hard", self.hard)]
        tasks.append(("graphs", self.graphs))
        for section, task in tasks:
            if section in self.options.sections:
                started = time.monotonic()
                task()
                print(f"-- {section}: {time.monotonic() - started:.1f} s", flush=True)
        self.write()


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs of one revision on one kind of device, parts of the whole."""
    report, *others = reports
    for other in others:
        for key in ("device", "torch", "driver", "revision", "rounds", "rows", "budgets"):
            if other.get(key) != report.get(key):
                raise SystemExit(f"{key}: {other.get(key)} beside {report.get(key)}")
        for key, value in other.items():
            if isinstance(value, list) and key != "budgets":
                report[key] = report[key] + value
    return report


def carry_peers(report: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Add peers that this machine lacked, from an earlier run on the same inputs.

    Their times are scaled so that each keeps its ratio to cuDNN's of its own run; the report
    names them under ``carried``.
    """

    def known_by(cell: dict[str, Any]) -> tuple[Any, ...]:
        return cell["text"], cell["len"], tuple(cell["layers"])

    known = {known_by(cell): cell["contenders"] for cell in earlier["cells"]}
    carried: dict[str, str] = {}
    for cell in report["cells"]:
        then, now = known.get(known_by(cell), {}), cell["contenders"]
        if CUDNN not in then or CUDNN not in now:
            continue
        factor = now[CUDNN]["ms"]["median"] / then[CUDNN]["ms"]["median"]
        for name in NAMES.keys() & then.keys() - now.keys():
            ms = {key: factor * value for key, value in then[name]["ms"].items()}
            now[name] = {"errors": then[name]["errors"], "ms": ms}
            cell["absent"].pop(name, None)
            own = f"{earlier['revision']}, {earlier['date']}"
            carried[name] = earlier.get("carried", {}).get(name, own)
    report["carried"] = carried


def complete(report: dict[str, Any], older: dict[str, Any]) -> None:
    """Add the problems that a run left out, from one of an earlier revision, and say so."""

    def known_by(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["text"], entry["len"], tuple(entry.get("layers", ()))

    added = []
    for key in ("captures", "cells"):
        known = {known_by(entry) for entry in report[key]}
        missing = [entry for entry in older[key] if known_by(entry) not in known]
        report[key] = missing + report[key]
        if key == "cells":
            added += sorted({entry["len"] for entry in missing})
    added = [f"{length // 1024}k tokens" for length in added]
    for key, name in (("hard", "hard inputs"), ("needles", "needles")):
        if not report[key] and older[key]:
            report[key] = older[key]
            added.append(name)
    if added:
        remark = f"Of an earlier revision, {older['revision']}: {', '.join(added)}."
        report["remarks"] = [*report.get("remarks", ()), remark]


def main() -> None:
    """Measure, or render an earlier measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder that gpu_capture.py wrote")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--render", type=Path, metavar="FILE")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--peers-of", type=Path, metavar="FILE")
    parser.add_argument("--rest-of", type=Path, metavar="FILE")
    parser.add_argument("--revision", default="unknown", help="of this repository")
    parser.add_argument("--texts", nargs="+", default=["prose", "code"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--peers", nargs="*", choices=tuple(NAMES), default=list(NAMES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, default=2048, help="exact rows a head, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--burst-ms", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=280.0, help="begin nothing later")
    parser.add_argument("--unit", type=int, default=16_384, help="shortest hard case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.render:
        report = json.loads(options.render.read_text())
        options.render.with_suffix(".md").write_text(adaptive_report.markdown(report))
        adaptive_plots.plot(report, options.render.with_suffix(".png"))
        return
    if options.join:
        report = joined([json.loads(path.read_text()) for path in options.join])
        if options.peers_of:
            carry_peers(report, json.loads(options.peers_of.read_text()))
        if options.rest_of:
            complete(report, json.loads(options.rest_of.read_text()))
        (options.out / "gpu_adaptive.json").write_text(json.dumps(report))
        return
    if options.data is None:
        parser.error("--data names the folder that gpu_capture.py wrote")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(options)
    started = time.monotonic()
    try:
        run.everything()
    finally:
        run.write()
        print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    print(adaptive_report.summary(run.report))


if __name__ == "__main__":
    main()
