"""What PyTorch's operations cost on a device: measured once, kept on disk, read by plans.

`adaattn warmup` measures (`adaattn_torch.backend.pricing`). A file holds for one machine, one
version of PyTorch and one number of threads; another one has prices of its own, or those of the
target ``torch_cpu``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from adaattn_core.costs import CostModel, get_cost_model
from adaattn_core.files import atomic_write_text, cache_folder

TARGET = "torch_cpu"
SCHEMA = 1
"""Raise this when what is measured changes its meaning."""
MEASURED = ("flops", "softmax_rate", "efficiency", "head_seconds", "key_seconds", "source")
"""Fields of `CostModel` that are kept."""


def known(device: str = "cpu") -> CostModel | None:
    """Return what was measured on a kind of device; None without, or where it is damaged."""
    return _read(_path(device))


def prices() -> Mapping[str, CostModel]:
    """Measured prices by kind of device."""
    return _prices(cache_folder("prices"), torch.get_num_threads())


@lru_cache(maxsize=16)
def _prices(folder: Path, threads: int) -> Mapping[str, CostModel]:
    """Look once: every call asks for its backend's capabilities."""
    paths = {d: _path_for(_made_for(d, threads), folder) for d in ("cpu", "cuda", "mps", "xpu")}
    found = {device: _read(path) for device, path in paths.items()}
    return {device: model for device, model in found.items() if model is not None}


def keep(device: str, model: CostModel) -> Path:
    """Write prices; returns where."""
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {name: getattr(model, name) for name in MEASURED}
    body["flops"], body["efficiency"] = dict(model.flops), dict(model.efficiency)
    atomic_write_text(
        path,
        json.dumps({"made_for": _made_for(device, torch.get_num_threads()), **body}, indent=1),
    )
    _read.cache_clear()
    _prices.cache_clear()
    return path


def _made_for(device: str, threads: int) -> str:
    name = platform.processor() or platform.machine()
    if device == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{device}, {platform.node()}, {name}, {capability}, {os.cpu_count()} cores,"
        f" {threads} threads, PyTorch {torch.__version__}, {SCHEMA}"
    )


def _path(device: str) -> Path:
    made_for = _made_for(device, torch.get_num_threads())
    return _path_for(made_for, cache_folder("prices"))


def _path_for(made_for: str, folder: Path) -> Path:
    digest = hashlib.sha256(made_for.encode()).hexdigest()[:16]
    return folder / f"torch-{digest}.json"


@lru_cache(maxsize=64)
def _read(path: Path) -> CostModel | None:
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        said = {name: body[name] for name in MEASURED}
        base = get_cost_model(TARGET)
        numbers = [*said["flops"].values(), *said["efficiency"].values()]
        numbers += [said["softmax_rate"], said["head_seconds"], said["key_seconds"]]
        if not all(0 < float(x) < math.inf for x in numbers):
            return None
        if not (base.flops.keys() == said["flops"].keys() and isinstance(said["source"], str)):
            return None
        return dataclasses.replace(base, **said)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing was measured, or somebody else's file: measured again some day
