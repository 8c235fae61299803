"""Commands of the CUDA backend: ``cache`` and ``kernels``, and its part of ``warmup``."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from adaattn_core.errors import BackendUnavailableError
from adaattn_cuda import environment
from adaattn_cuda.device import driver
from adaattn_cuda.jit.cache import DiskCache
from adaattn_cuda.jit.compile import Built, Compiler, build
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels import shipped

__all__ = ["register"]

EXIT_OVER_BUDGET = 1

cache_app = typer.Typer(help="Look at or empty the cache of compiled kernels.")

Arch = Annotated[
    str | None, typer.Option(help="e.g. sm_90a; default: the devices of this machine")
]
Jobs = Annotated[int, typer.Option(min=1, help="compilers to run at a time")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def register(group: typer.Typer) -> None:
    """Add the commands to the application."""
    group.command()(kernels)
    group.add_typer(cache_app, name="cache")


def warm_up(say: Callable[[str], None], arch: str | None, jobs: int) -> None:
    """Compile the usual kernels now, so that no first call has to."""
    count = 0
    for built in _build_all(_specs(arch), jobs, fresh=False):
        source = "cached" if built.cached else f"{built.seconds:.1f} s"
        say(f"{built.spec.arch} {built.spec.name}: {source}")
        count += 1
    say(f"{count} kernels in {DiskCache(environment.cache_dir()).root}")


def kernels(
    arch: Arch = None,
    jobs: Jobs = 2,
    as_json: Json = False,
    fresh: Annotated[bool, typer.Option(help="compile again what the cache has")] = False,
) -> None:
    """Compile every shipped kernel and compare it with the budget in its header.

    Needs no GPU. Exit code 1 if a kernel spills or exceeds its budget.
    """
    rows, violations = [], []
    for built in _build_all(_specs(arch), jobs, fresh=fresh):
        row = _row(built)
        rows.append(row)
        found = shipped.budget(built.spec).violations(built.resources, built.spec.smem_bytes)
        violations += [f"{row['arch']} {row['name']}: {text}" for text in found]
        if not as_json:
            typer.echo(
                f"{row['arch']:<8} {row['registers']:>3} regs {row['spill_bytes']:>4} B spilled"
                f" {row['smem_bytes']:>6} B smem {row['seconds']:>5.1f} s  {row['name']}"
            )
    if as_json:
        typer.echo(json.dumps({"kernels": rows, "violations": violations}, indent=1))
    for text in violations:
        typer.echo(f"over budget: {text}", err=True)
    if violations:
        raise typer.Exit(EXIT_OVER_BUDGET)


@cache_app.command("path")
def cache_path() -> None:
    """Print the cache's folder."""
    typer.echo(DiskCache(environment.cache_dir()).root)


@cache_app.command("ls")
def cache_ls(as_json: Json = False) -> None:
    """List the compiled kernels."""
    entries = list(DiskCache(environment.cache_dir()).entries())
    if as_json:
        rows = [
            {
                "key": entry.key,
                "name": entry.name,
                "arch": entry.arch,
                "nvrtc": entry.nvrtc,
                "bytes": entry.size_bytes,
            }
            for entry in entries
        ]
        typer.echo(json.dumps({"entries": rows}, indent=1))
        return
    for entry in entries:
        typer.echo(
            f"{entry.key[:12]} {entry.arch:<8} {entry.size_bytes / 1024:>6.0f} KiB"
            f" nvrtc {entry.nvrtc:<10} {entry.name}"
        )
    typer.echo(f"{len(entries)} kernels, {sum(e.size_bytes for e in entries) / 2**20:.1f} MiB")


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove every compiled kernel."""
    typer.echo(f"removed {DiskCache(environment.cache_dir()).clear()} kernels")


def _specs(arch: str | None) -> list[KernelSpec]:
    if arch is not None:
        return shipped.specs(arch)
    count = driver.device_count()
    if count == 0:
        raise BackendUnavailableError(
            got="a machine without a CUDA device",
            needed="an architecture to compile for",
            do="name one: --arch sm_90a",
            reason="no device",
        )
    archs = dict.fromkeys(driver.device_facts(device).arch for device in range(count))
    return [spec for name in archs for spec in shipped.specs(name)]


def _build_all(specs: list[KernelSpec], jobs: int, *, fresh: bool) -> Iterator[Built]:
    """Build in parallel, yield in order; every thread keeps one compiling child."""
    jobs = min(jobs, os.cpu_count() or 1, max(len(specs), 1))

    def work(part: list[KernelSpec], report: Callable[[Built], Any]) -> None:
        with Compiler() as compiler:
            for spec in part:
                report(compiler.compile(spec) if fresh else build(spec, compiler=compiler))

    done: dict[KernelSpec, Built] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        parts = [
            pool.submit(work, specs[first::jobs], lambda made: done.update({made.spec: made}))
            for first in range(jobs)
        ]
        for part in parts:
            part.result()
    yield from (done[spec] for spec in specs)


def _row(built: Built) -> dict[str, Any]:
    return {
        "name": built.spec.name,
        "arch": built.spec.arch,
        "registers": built.resources.registers,
        "spill_bytes": built.resources.spill_bytes,
        "smem_bytes": built.spec.smem_bytes,
        "seconds": round(built.seconds, 3),
    }
