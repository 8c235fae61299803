"""The pages about the code name files that exist, and every kernel."""

from __future__ import annotations

import re
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
