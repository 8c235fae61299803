"""``adaattn doctor``: is this installation sound, and if not, what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from threadpoolctl import threadpool_info

from adaattn_core import __version__
from adaattn_core.api import attention
from adaattn_core.arrays import to_numpy
from adaattn_core.costs import get_cost_model
from adaattn_core.errors import AdaAttnError
from adaattn_core.plugins.registry import get_backend, list_backends
from adaattn_core.problem import AttentionProblem
from adaattn_core.report.tables import console, print_json
from adaattn_core.testing.oracles import exact_attention, relative_frobenius

_REQUIRED = ("numpy", "scipy", "pluggy", "ml_dtypes", "array-api-compat", "safetensors")
_OPTIONAL = {
    "matplotlib": "the figure of `adaattn demo`",
    "torch": "PyTorch tensors",
    "cupy-cuda13x": "the CUDA backend",
    "cuda-core": "compiling CUDA kernels",
}
_SELF_TEST_TOLERANCE = 1e-5
"""Relative; float32 attention over 96 keys errs by about 1e-7."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``state`` is ok, note or broken."""

    name: str
    state: str
    detail: str


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON instead of a table")
    ] = False,
) -> None:
    """Check the installation (exit code 1 if broken)."""
    findings = [*_machine(), *_packages(), *_variables(), *_backends()]
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print_json({"sound": not broken, "findings": [asdict(f) for f in findings]})
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            table.add_row(finding.state, finding.name, finding.detail)
        console().print(table)
    raise typer.Exit(1 if broken else 0)


def _machine() -> list[Finding]:
    cores = os.cpu_count() or 1
    pools = [p for p in threadpool_info() if p["user_api"] == "blas"]
    blas = ", ".join(
        f"{p['internal_api']} {p['version']}, {p['num_threads']} threads" for p in pools
    )
    return [
        Finding("adaattn", "ok", __version__),
        Finding("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("machine", "ok", f"{platform.platform()}, {cores} cores"),
        Finding("BLAS", "ok" if blas else "note", blas or "unknown to threadpoolctl"),
    ]


def _packages() -> list[Finding]:
    found = []
    for name in _REQUIRED:
        version = _version(name)
        state = "ok" if version else "broken"
        found.append(Finding(name, state, version or f"missing: pip install {name}"))
    for name, use in _OPTIONAL.items():
        version = _version(name)
        absent = f"not installed, needed for {use}"
        found.append(Finding(name, "ok" if version else "note", version or absent))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _variables() -> list[Finding]:
    names = sorted(name for name in os.environ if name.startswith("ADAATTN_"))
    return [Finding(name, "note", f"is set to {os.environ[name]!r}") for name in names]


def _backends() -> list[Finding]:
    """Compute a small problem on every backend that claims to run here and compare."""
    found = []
    for info in list_backends():
        if not info.name:
            found.append(Finding(f"plugin {info.plugin}", "broken", info.reason))
        elif not info.available:
            found.append(Finding(f"backend {info.name}", "note", info.reason))
        else:
            found.append(_self_test(info.name))
            found += _prices(info.name)
    if not any(f.name.startswith("backend") and f.state == "ok" for f in found):
        found.append(Finding("backends", "broken", "none can run here: reinstall adaattn"))
    return found


def _prices(backend: str) -> list[Finding]:
    """Where the prices that plans are made with come from."""
    try:
        can = get_backend(backend).capabilities()
    except Exception:  # its self-test has said so
        return []
    given = can.costs.values() or [get_cost_model(can.target)]
    return [Finding(f"prices {backend}", "ok", model.source) for model in given]


def _self_test(backend: str) -> Finding:
    name = f"backend {backend}"
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 96, 32), np.float32) for _ in range(3))
    exact = exact_attention(AttentionProblem.from_arrays(q, k, v)).out
    try:
        out = to_numpy(attention(q, k, v, budget=None, backend=backend).out)
    except AdaAttnError as error:
        return Finding(name, "note", f"takes no NumPy arrays here: {error.got}")
    except Exception as error:  # whatever a third party's backend does, the doctor reports it
        return Finding(name, "broken", f"{type(error).__name__}: {error}")
    error_rel = relative_frobenius(out, exact)
    sound = error_rel <= _SELF_TEST_TOLERANCE
    verdict = f"self-test, relative error {error_rel:.1e}"
    return Finding(name, "ok" if sound else "broken", verdict)
