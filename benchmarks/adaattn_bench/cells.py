"""Benchmarks of one pass over cells of head dim, length and mask: measured, told and drawn.

A script says what its contenders are and how operations are counted; the rest is here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaattn_bench.clock import Burst, take_turns
from adaattn_bench.devices import describe, measure_rates, torch_module

TOKENS = 16_384
WIDTH = 2_048
OURS, CUDNN, FA2, FA3 = "adaattn", "cuDNN", "FA2", "FA3"
OTHERS = (CUDNN, FA3)
"""Against whose better one we are held."""

Cell = tuple[int, int, bool]
"""dim, len, causal"""
Report = dict[str, Any]


def cell_named(text: str) -> Cell:
    """Return the cell of a text like ``128:16384:full``."""
    dim, length, mask = text.split(":")
    return int(dim), int(length), {"full": False, "causal": True}[mask]


def mask_name(causal: bool) -> str:
    """Name of a mask in tables and on the command line."""
    return "causal" if causal else "full"


@dataclass(frozen=True)
class Pass:
    """One pass, and how it is measured.

    Attributes
    ----------
    stem : str
        Of the script and of the files that it writes.
    title, counted : str
        Heading, and what TFLOP/s count and calls return.
    products : int
        Matrix products of 2 b h n^2 d operations, half of them under a causal mask.
    cells : sequence of Cell
    arrays : int
        Random arrays of a call: query, key, value, and what else it is given.
    contenders : callable
        Bursts of a cell by name, from two sets of arrays and the mask; and facts for the
        report, ``difference`` from cuDNN among them.
    agreement_rel : float
        Largest relative difference from cuDNN that two bf16 passes can have on these inputs.
    colours : mapping of str to str
        Of bars; its names are the table's columns.
    remark : str
        Below the table.
    """

    stem: str
    title: str
    counted: str
    products: int
    cells: Sequence[Cell]
    arrays: int
    contenders: Callable[[list[list[Any]], bool], tuple[dict[str, Burst], dict[str, Any]]]
    agreement_rel: float
    colours: Mapping[str, str]
    remark: str

    def tflops(self, dim: int, length: int, causal: bool, milliseconds: float) -> float:
        """Operations over time."""
        count = 2 * self.products * TOKENS * (WIDTH // dim) * length * dim
        return count / (2 if causal else 1) / milliseconds / 1e9

    # --- measuring ----------------------------------------------------------------------------
    def measure(
        self, rounds: int, burst_ms: float, revision: str, chosen: Sequence[Cell]
    ) -> Report:
        """Run everything; whoever fails, or computes anything but cuDNN's output, ends it."""
        report: Report = {
            **describe("cuda"),
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python benchmarks/{self.stem}.py",
            "revision": revision,
            "rounds": rounds,
            "burst_ms": burst_ms,
            "ceilings_before": ceilings(),
            "cells": [],
        }
        for cell in chosen or self.cells:
            found = self._cell(cell, rounds, burst_ms)
            report["cells"].append(found)
            rates = {name: round(rate) for name, rate in found["tflops"].items()}
            dim, length, causal = cell
            print(dim, length, mask_name(causal), rates, f"{found['ratio']:.3f}", flush=True)
        report["ceilings_after"] = ceilings()
        ratios = [cell["ratio"] for cell in report["cells"]]
        report["geometric_mean"] = math.exp(statistics.fmean(math.log(r) for r in ratios))
        report["worst"] = min(ratios)
        return report

    def _cell(self, cell: Cell, rounds: int, burst_ms: float) -> dict[str, Any]:
        dim, length, causal = cell
        torch = torch_module()
        shape = (TOKENS // length, WIDTH // dim, length, dim)
        sets = [
            [
                torch.randn(shape, device="cuda", dtype=torch.bfloat16)
                for _ in range(self.arrays)
            ]
            for _ in range(2)
        ]
        bursts, facts = self.contenders(sets, causal)
        if not facts["difference"] < self.agreement_rel:
            raise SystemExit(f"wrong result at {cell}: {facts['difference']}")
        timings = take_turns(bursts, rounds, burst_ms, most=sys.maxsize)
        if timings.failed:
            raise SystemExit(f"failed: {timings.failed}")
        times = {name: summary.median for name, summary in timings.summaries().items()}
        return {
            "dim": dim, "len": length, "causal": causal, "milliseconds": times,
            "tflops": {name: self.tflops(*cell, ms) for name, ms in times.items()},
            "ratio": min(times[n] for n in OTHERS if n in times) / times[OURS], **facts,
        }  # fmt: skip

    # --- reporting ----------------------------------------------------------------------------
    def markdown(self, report: Report) -> str:
        """Page of a report."""
        before, after = report["ceilings_before"], report["ceilings_after"]
        names = tuple(self.colours)
        ratios = [cell["ratio"] for cell in report["cells"]]
        driver = f", driver {report['driver']}" if report.get("driver") else ""
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines = [
            f"# {self.title}",
            "",
            f"{report['device']}{driver}, CUDA {report['cuda']},"
            f" PyTorch {report['torch']}, cuDNN {report['cudnn']}, {report['date']}."
            f" `{report['command']}` at revision {report['revision']}.",
            "",
            f"bf16, {TOKENS:,} tokens in all, model width {WIDTH:,}. {self.counted};"
            f" medians of {report['rounds']} rounds of {report['burst_ms']:g} ms bursts in"
            " random order.",
            "Ceilings of the same run, before and after: bf16 matmul 8192³"
            f" {before['matmul_tflops']:.0f} and {after['matmul_tflops']:.0f} TFLOP/s,"
            f" copy {before['copy_tbps']:.2f} and {after['copy_tbps']:.2f} TB/s.",
            "The card is at its power limit throughout, so the rates of all contenders, the"
            " matrix product's included, fall as it warms up: compare within a row.",
            "",
            "| head dim | mask | len | " + " | ".join(names) + " | best other / ours, time |",
            "|---|---|---|" + "---|" * (len(names) + 1),
        ]
        for cell in report["cells"]:
            rates = [f"{cell['tflops'][n]:.0f}" if n in cell["tflops"] else "-" for n in names]
            lines.append(
                f"| {cell['dim']} | {mask_name(cell['causal'])} | {cell['len']:,} | "
                + " | ".join(rates)
                + f" | {cell['ratio']:.2f} |"
            )
        lines += [
            "",
            "Geometric mean of time(best of cuDNN, FA3) / time(ours):"
            f" **{mean:.3f}**, worst cell {min(ratios):.3f}."
            f" {self.remark}",
            *(["", report["note"]] if report.get("note") else []),
            "",
            f"![TFLOP/s by head dim, mask and length]({self.stem}.png)",
            "",
        ]
        return "\n".join(lines)

    def plot(self, report: Report, path: Path) -> None:
        """Bars of TFLOP/s, one panel for each head dim and mask."""
        plt: Any = importlib.import_module("matplotlib.pyplot")
        dims = sorted({cell["dim"] for cell in report["cells"]})
        figure, axes = plt.subplots(
            2, len(dims), figsize=(1.5 + 3.2 * len(dims), 5.5), sharey=True,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        width = 0.8 / len(self.colours)
        for column, dim in enumerate(dims):
            for row, causal in enumerate((False, True)):
                axis = axes[row][column]
                cells = [c for c in report["cells"] if (c["dim"], c["causal"]) == (dim, causal)]
                for k, (name, colour) in enumerate(self.colours.items()):
                    heights = [c["tflops"].get(name, 0.0) for c in cells]
                    shift = width * (k - (len(self.colours) - 1) / 2)
                    places = [i + shift for i in range(len(heights))]
                    axis.bar(places, heights, 0.95 * width, color=colour, label=name)
                axis.set_xticks(range(len(cells)), [f"{c['len'] // 1024}k" for c in cells])
                axis.set_title(f"head dim {dim}, {mask_name(causal)}", fontsize=10)
                axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].legend(fontsize=8, frameon=False)
        figure.supylabel("TFLOP/s, bf16")
        figure.suptitle(f"{report['device']}, {report['date']}", fontsize=10)
        figure.savefig(path, dpi=130)

    # --- the command --------------------------------------------------------------------------
    def main(self, description: str, arguments: Sequence[str] | None = None) -> None:
        """Measure, or render an earlier measurement."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawTextHelpFormatter
        )
        add_report_options(parser)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--burst-ms", type=float, default=40.0)
        parser.add_argument(
            "--cells", nargs="*", type=cell_named, default=[], metavar="DIM:LEN:full|causal",
            help="only these, to stdout: nothing is written",
        )  # fmt: skip
        options = parser.parse_args(arguments)
        if options.render:
            render(options.render, self.markdown, self.plot)
            return
        report = self.measure(options.rounds, options.burst_ms, options.revision, options.cells)
        if options.cells:
            print(json.dumps(report, indent=1))
            return
        (options.out / f"{self.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"{self.stem}.md").write_text(self.markdown(report))
        print(f"geometric mean {report['geometric_mean']:.3f}, worst {report['worst']:.3f}")


def ceilings() -> dict[str, float]:
    """Rates of a large bf16 matrix product (TFLOP/s) and of a large copy (TB/s)."""
    rates = measure_rates("cuda", "bfloat16")
    return {"matmul_tflops": rates.matmul / 1e12, "copy_tbps": rates.copy / 1e12}


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every script that writes a report which can be rendered again."""
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--render", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--revision", default="unknown", help="of this repository, for the record"
    )


def render(
    path: Path, markdown: Callable[[Report], str], plot: Callable[[Report, Path], None]
) -> None:
    """Write page and plot of an earlier report beside it."""
    report = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(report))
    plot(report, path.with_suffix(".png"))


def difference(mine: Sequence[Any], reference: Sequence[Any]) -> float:
    """Largest relative difference in norm of pairs of tensors."""
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(mine, reference, strict=True)
    )
