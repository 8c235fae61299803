"""Examples in the adapter's docstrings print what they say; its names are in the reference."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import adaattn_torch
import adaattn_torch.entries.flash
import adaattn_torch.entries.mode


@pytest.mark.parametrize("module", [adaattn_torch.entries.flash, adaattn_torch.entries.mode])
def test_examples_print_what_they_say(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("name", sorted(set(adaattn_torch.__all__) - {"compat"}))
def test_every_public_name_is_in_the_reference(name) -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "torch.md"
    thing = getattr(adaattn_torch, name)
    full = f"{inspect.getmodule(thing).__name__}.{name}"
    listed = page.read_text(encoding="utf-8")
    by_module = f"automodule:: {inspect.getmodule(thing).__name__}" in listed
    assert f":: {full}\n" in listed or (by_module and f" {name}" in listed)
