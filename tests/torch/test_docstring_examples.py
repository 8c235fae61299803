"""Examples in the adapter's docstrings print what they say."""

from __future__ import annotations

import doctest

import pytest

import adaattn_torch.flash
import adaattn_torch.mode


@pytest.mark.parametrize("module", [adaattn_torch.flash, adaattn_torch.mode])
def test_examples_print_what_they_say(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
