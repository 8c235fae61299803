"""What runs in processes of its own on a device: compute-sanitizer, and the conformance kit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
LIMIT_S = 580
TOOLS = ("memcheck", "racecheck", "synccheck")
SMALL = Path(__file__).parent / "small_launches.py"
# Without plugins that warn beside xdist or in a read-only folder: warnings are errors here.
KIT = (
    "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider",
    "-p", "adaattn_core.testing.pytest_plugin",
    "--pyargs", "adaattn_core.testing.conformance",
    "--adaattn-backend", "cuda", "--adaattn-arrays", "torch:cuda",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(shared_kernels: Path) -> dict[str, str]:
    """One kernel cache for all processes."""
    return {**os.environ, "ADAATTN_CACHE_DIR": str(shared_kernels)}


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tool", "launches"),
    [("memcheck", "exact"), ("racecheck", "few"), ("synccheck", "exact")]
    + [
        (tool, what)
        for what in ("adaptive", "backward", "rules", "eight_bit", "blocks", "decode")
        for tool in TOOLS
    ],
)
def test_sanitizer(tool: str, launches: str, environment: dict[str, str]) -> None:
    """Of the kernels alone: the array library may ask the driver in vain."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine (it comes with the CUDA toolkit)")
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    run([sanitizer, *options, sys.executable, str(SMALL), launches], environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conformance_kit(environment: dict[str, str]) -> None:
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    run([sys.executable, *KIT, *side_by_side], environment)
