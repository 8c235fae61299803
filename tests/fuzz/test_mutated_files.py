"""A small part of the mutation run; docs/reference/errors.md records a large one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from adaattn_core.errors import FileError
from adaattn_core.testing import mutations

SUFFIXES = {".json", ".npy", ".npz", ".safetensors"}


def test_every_valid_file_is_read(tmp_path: Path) -> None:
    for name, data in mutations.valid_files().items():
        path = tmp_path / name
        path.write_bytes(data)
        assert mutations.outcome(path) == mutations.READ, name


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    report = mutations.run(1200, seed=1, folder=tmp_path)
    assert not report.failures, "\n".join(report.failures)
    assert {suffix for suffix, name in report.outcomes if name == mutations.READ} == SUFFIXES
    refused = {suffix for suffix, name in report.outcomes if name != mutations.READ}
    assert refused == SUFFIXES
    assert sum(report.outcomes.values()) == 1200


def test_a_mutation_can_be_made_again() -> None:
    for name, data in mutations.valid_files().items():
        for seed in range(20):
            first, second = (mutations.mutated(name, data, random.Random(seed)) for _ in "ab")
            assert first == second


@pytest.mark.parametrize("error", [KeyError("q"), FileError("two\nlines\x1b", "", "")])
def test_other_errors_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def read(path: Path) -> Any:
        raise error

    monkeypatch.setattr(mutations, "read_inputs", read)
    report = mutations.run(12, seed=0, folder=tmp_path, only=".npz")
    expected = isinstance(error, KeyError)
    assert bool(report.failures) == expected
    if expected:
        assert report.outcomes[".npz", "undocumented KeyError"] == 12
        assert "KeyError" in report.table()
        assert "seed 0/11" in report.failures[-1]
