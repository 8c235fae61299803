"""These tests are about the reference backend: it is what ``"auto"`` means here."""

from __future__ import annotations

import pytest

from adaattn_core.plugins.registry import default_registry, get_backend


@pytest.fixture(autouse=True)
def _reference_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(default_registry().chosen, "cpu", get_backend("numpy"))
