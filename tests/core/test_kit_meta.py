"""The kit itself is tested: it fails every sabotaged backend by the law that is meant to, and
passes the honest one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adaattn_core.testing.sabotage import SABOTAGES

KIT = [
    *(sys.executable, "-m", "pytest", "-p", "adaattn_core.testing.pytest_plugin"),
    *("--pyargs", "adaattn_core.testing.conformance", "--adaattn-profile", "ci"),
    *("-q", "-p", "no:cacheprovider", "--adaattn-backend"),
]


def run_kit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the kit as a stranger does: in a process of its own, in a foreign folder."""
    command = [*KIT, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", sorted(SABOTAGES))
def test_sabotage_is_caught(name: str, tmp_path: Path) -> None:
    law = SABOTAGES[name].caught_by
    done = run_kit(tmp_path, "numpy", "--adaattn-sabotage", name, "-x", "-k", law)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert f"::{law}" in done.stdout


@pytest.mark.slow
def test_the_numpy_backend_passes_the_whole_kit(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "numpy")
    assert done.returncode == pytest.ExitCode.OK, done.stdout


def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "nowhere")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "backend 'nowhere'" in done.stdout + done.stderr
    assert "do this:" in done.stdout + done.stderr


def test_a_backend_can_be_given_as_module_and_factory(tmp_path: Path) -> None:
    name = "adaattn_reference.backend:NumpyBackend"
    done = run_kit(tmp_path, name, "-k", "test_capabilities or test_provenance")
    assert done.returncode == pytest.ExitCode.OK, done.stdout


def test_arrays_of_another_library(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    laws = "test_result_has or test_bshd or test_inputs_stay"
    done = run_kit(tmp_path, "numpy", "--adaattn-arrays", "torch:cpu", "-k", laws)
    assert done.returncode == pytest.ExitCode.OK, done.stdout
