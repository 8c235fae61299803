"""``adaattn bench``: how fast, at what error, beside whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from adaattn_bench import bench_figures
from adaattn_bench.bench import Settings, sweep
from adaattn_bench.commands.options import Steps, numbers, wholes
from adaattn_bench.commands.outputs import Outputs, tell
from adaattn_bench.contenders import checked_peers
from adaattn_bench.devices import checked_device, torch_module
from adaattn_bench.problems import sizes_of
from adaattn_core.errors import ArgumentError
from adaattn_core.report.tables import console

Option = typer.Option
DEFAULT_LENGTHS = {"cpu": "1024,2048,4096", "cuda": "4096,16384,65536"}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command()(bench)


def bench(
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    data: Annotated[
        str, Option(help="demo (shipped real heads), local, normal, sink (drawn), or a file")
    ] = "local",
    lengths: Annotated[
        str | None, Option(help="tokens, by commas [default: up to 4096, on a GPU 65536]")
    ] = None,
    tokens: Annotated[
        int | None,
        Option(min=1, help="query rows, the last ones; 1 is decoding [default: all]"),
    ] = None,
    dims: Annotated[str | None, Option(help="head dimensions [default: 64]")] = None,
    heads: Annotated[
        str | None, Option(help="query heads, or query:key heads [default: 9:3]")
    ] = None,
    batch: Annotated[int, Option(min=1, help="sequences")] = 1,
    budgets: Annotated[str, Option(help="error budgets, by commas, or none")] = "0.05,0.1,0.2",
    peers: Annotated[str, Option(help="usual, all, none, or names by commas")] = "usual",
    dtype: Annotated[
        str | None,
        Option(help="float32, bfloat16 or float16 [default: float32, on a GPU bf16]"),
    ] = None,
    rounds: Annotated[int, Option(min=1, help="turns that each contender takes")] = 3,
    burst_ms: Annotated[float, Option(min=0, help="milliseconds of a turn")] = 100.0,
    truth_rows: Annotated[int, Option(min=1, help="rows compared with float64")] = 256,
    seconds: Annotated[float, Option(min=0, help="begin nothing later")] = 600.0,
    seed: Annotated[int, Option(min=0, help="of drawn heads, rows and turns")] = 0,
    out: Annotated[
        Path | None, Option(help="folder for bench.json, bench.md and bench.png")
    ] = None,
    stem: Annotated[str, Option(help="name of the files in that folder")] = "bench",
    report: Annotated[Path | None, Option(help="write a self-contained HTML page")] = None,
    as_json: Annotated[bool, Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Time this library and its peers in turn, with their errors beside."""
    where = checked_device(device)
    asked = checked_peers(peers, where)
    given = sizes_of(data)
    heads_q, heads_kv = _heads(heads, given)
    settings = Settings(
        device=where,
        dtype=dtype or DEFAULT_DTYPE[where],
        source=data,
        lengths=wholes("--lengths", lengths or _lengths(where, given)),
        dims=wholes("--dims", dims or str(given[3] if given else 64)),
        budgets=() if budgets == "none" else numbers("--budgets", budgets),
        peers=asked if torch_module() is not None else (),
        heads_q=heads_q,
        heads_kv=heads_kv,
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        burst_ms=burst_ms,
        truth_rows=truth_rows,
        seconds=seconds,
        seed=seed,
    )
    outputs = Outputs.checked(out, stem, report)
    with Steps("bench", 1 + len(settings.shapes())) as steps:
        found = sweep(settings, steps.note)
    outputs.write(found, bench_figures)
    tell(found, as_json, _show)


def _heads(text: str | None, given: tuple[int, ...] | None) -> tuple[int, int]:
    if text is None:
        return (given[0], given[1]) if given else (9, 3)
    parts = wholes("--heads", text.replace(":", ","))
    if len(parts) > 2 or parts[0] % parts[-1]:
        raise ArgumentError(
            got=f"--heads {text}",
            needed="query heads, or query:key heads where the first is a multiple",
            do="e.g. --heads 9:3",
        )
    return parts[0], parts[-1]


def _lengths(device: str, given: tuple[int, ...] | None) -> str:
    usual = DEFAULT_LENGTHS[device]
    if given is None:
        return usual
    fitting = [n for n in wholes("--lengths", usual) if n <= given[2]]
    return ",".join(map(str, fitting or [given[2]]))


def _show(found: dict[str, Any]) -> None:
    screen = console()
    for cell in found["cells"]:
        table = Table(
            title=f"{bench_figures.title_of(cell)}; keys and values"
            f" {cell['cache_bytes'] / 1e6:,.2f} MB",
            title_justify="left", box=None, pad_edge=False, header_style="bold",
        )  # fmt: skip
        rows = bench_figures.table_rows(cell)
        columns = list(zip(bench_figures.header(), *rows, strict=True))
        for number, (name, *cells) in enumerate(columns):
            if set(cells) - {"-"} and name not in bench_figures.ON_PAGES_ONLY:
                width = max(map(len, (name, *cells)))
                align: Any = "right" if number else "left"
                table.add_column(name, justify=align, no_wrap=True, min_width=width)
        kept = {column.header for column in table.columns}
        for row in rows:
            pairs = zip(bench_figures.header(), row, strict=True)
            table.add_row(*(cell for name, cell in pairs if name in kept))
        screen.print(table)
        for name, why in cell["absent"].items():
            screen.print(f"not here: {name}: {why}")
        screen.print()
    for text in found["cut_short"]:
        screen.print(f"not measured: {text}")
