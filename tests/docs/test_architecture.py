"""The pages about the code name files that exist, and every kernel; so does the picture."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVICE = ROOT / "kernels_cu/adaattn_kernels_cu/adaattn"
PLACES = (ROOT, DEVICE, ROOT / "backends/adaattn_cuda", ROOT / "tests/cuda")
PATH = re.compile(r"`([\w./]+\.(?:py|cuh|toml|md))`")


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "docs/explanation/architecture.md", "docs/kernels/index.md"]
)
def test_named_files_exist(page: str) -> None:
    named = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert named
    missing = [name for name in named if not any((p / name).exists() for p in PLACES)]
    assert not missing


def test_every_kernel_is_listed() -> None:
    listed = (ROOT / "docs/kernels/index.md").read_text(encoding="utf-8")
    entries = [
        source
        for folder in ("attn", "plan", "quant")
        for source in (DEVICE / folder).glob("*.cuh")
        if "struct Traits" in source.read_text(encoding="utf-8")  # what a compilation names
    ]
    assert entries
    missing = [s.stem for s in entries if f"`{s.parent.name}/{s.name}`" not in listed]
    assert not missing


def test_rooms_of_the_picture_exist() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "figures"))
    houses = importlib.import_module("architecture").HOUSES
    folders = {
        "adaattn_core": ROOT / "adaattn_core",
        "adaattn_reference": ROOT / "reference/adaattn_reference",
        "adaattn_cuda": ROOT / "backends/adaattn_cuda",
        "adaattn_torch": ROOT / "backends/adaattn_torch",
        "adaattn_kernels_cu": DEVICE,
    }
    assert {house.package for house in houses} == set(folders)
    missing = [
        f"{house.package}.{name}"
        for house in houses
        for row in house.rows
        for names, _ in row
        for name in names.split(", ")
        if not any((folders[house.package] / f"{name}{end}").exists() for end in ("", ".py"))
    ]
    assert not missing
