"""The toy backend of docs/examples is installed as a stranger would, found, and judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = ROOT / "docs" / "examples" / "adaattn-toy"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the wheels of AdaAttn and of the toy are installed."""
    wheels = tmp_path_factory.mktemp("wheels")
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    quiet = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*build, str(ROOT), str(TOY)], check=True)
    built = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    assert len(built) == 2
    subprocess.run([*pip, "install", *quiet, "-t", str(target), *built], check=True)
    return os.environ | {"PYTHONPATH": str(target), "SITE": str(target)}


def test_the_kit_comes_from_the_wheel(installed: dict[str, str], tmp_path: Path) -> None:
    code = "import adaattn_core.testing.kit as k, adaattn_toy; print(k.__file__)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=installed,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.startswith(installed["SITE"])


def test_it_is_found_by_name(installed: dict[str, str]) -> None:
    code = (
        "import json; from adaattn_core import list_backends;"
        "print(json.dumps([[b.name, b.plugin, b.available] for b in list_backends()]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], env=installed, check=True, capture_output=True, text=True
    ).stdout
    assert ["toy", "toy", True] in json.loads(printed)


def test_discovery_does_not_import_the_mechanism(installed: dict[str, str]) -> None:
    code = (
        "import sys; from adaattn_core import list_backends; list_backends();"
        "assert 'adaattn_toy.plugin' in sys.modules;"
        "assert 'adaattn_toy.backend' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=installed, check=True)


@pytest.mark.slow
def test_it_passes_the_kit(installed: dict[str, str], tmp_path: Path) -> None:
    kit = ["-p", "adaattn_core.testing.pytest_plugin", "--adaattn-profile", "ci"]
    package = ["--pyargs", "adaattn_core.testing.conformance", "--adaattn-backend", "toy"]
    command = [sys.executable, "-m", "pytest", *kit, *package, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    assert "passed" in done.stdout


def test_it_is_small() -> None:
    lines = sum(len(f.read_text().splitlines()) for f in TOY.rglob("*.py"))
    assert lines <= 200, "an example that nobody reads to the end is no example"
