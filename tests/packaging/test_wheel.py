"""The wheel: what is in it, and that it works where nothing else of the repository is."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ADAATTN_")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (path,) = folder.glob("adaattn-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(folder))
    python("-m", "pip", "install", *options, str(wheel), cwd=folder)
    return folder


def test_the_source_archive_holds_the_project_and_nothing_else(tmp_path: Path) -> None:
    python("-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path), cwd=ROOT)
    (path,) = tmp_path.glob("adaattn-*.tar.gz")
    with tarfile.open(path) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    folders = {"adaattn_core", "reference", "backends", "kernels_cu", "tests", "docs"}
    folders |= {"benchmarks", ".ci"}
    files = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
    files |= {"PKG-INFO", ".gitignore"}
    assert tops == folders | files


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_top_level_names_are_prefixed(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert {"adaattn_core", "adaattn_reference", "adaattn_cuda", "adaattn_bench"} <= packages
    assert [top for top in packages if not top.startswith("adaattn_")] == []


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("adaattn_kernels_cu/", ".cuh"),
        ("adaattn_core/demo_data/", ".npz"),
        ("adaattn_core/demo_data/", "NOTICE.md"),
        ("adaattn_core/report/assets/", "page.js"),
        ("adaattn_core/report/assets/", "page.css"),
        ("adaattn_core/testing/conformance/test_", ".py"),
        ("adaattn-", "licenses/LICENSE"),
    ],
)
def test_data_is_inside(wheel: Path, prefix: str, suffix: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = [n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix)]
        assert found
        assert all(archive.getinfo(name).file_size > 100 for name in found)


def test_typed_marker_is_inside(wheel: Path) -> None:
    assert "adaattn_core/py.typed" in names(wheel)


def test_entry_points_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        declared = configparser.ConfigParser()
        declared.read_string(archive.read(name).decode())
    assert declared["adaattn"]["numpy"] == "adaattn_reference.plugin"
    assert declared["adaattn"]["bench"] == "adaattn_bench.plugin"
    assert declared["adaattn"]["cuda"] == "adaattn_cuda.plugin"
    assert declared["console_scripts"]["adaattn"] == "adaattn_core.cli.app:main"


def test_the_installed_wheel_is_what_gets_imported(installed: Path, tmp_path: Path) -> None:
    code = (
        "import adaattn_core, adaattn_reference as r; print(adaattn_core.__file__, r.__file__)"
    )
    printed = python("-c", code, cwd=tmp_path, path=installed)
    assert printed.count(str(installed)) == 2


def test_the_demo_runs_from_the_wheel_in_a_foreign_folder(
    installed: Path, tmp_path: Path
) -> None:
    script = str(installed / "bin" / "adaattn")
    body = json.loads(python(script, "demo", "--json", cwd=tmp_path, path=installed))
    assert {head["layer"] for head in body["heads"]} == {"9", "16"}
    assert (tmp_path / "adaattn-demo.png").read_bytes().startswith(b"\x89PNG")
