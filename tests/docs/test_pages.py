"""Pages: links resolve, Python blocks run, the README keeps its promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    + [p for p in DOCS.rglob("*.md") if "_build" not in p.parts]
)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
README_LINES_MOST = 120


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_python() -> list[Path]:
    kinds = (DOCS / "tutorial", DOCS / "how-to")
    chosen = [
        p for p in PAGES if (p.name == "README.md" and p.parent == ROOT) or p.parent in kinds
    ]
    return [p for p in chosen if PYTHON.search(p.read_text(encoding="utf-8"))]


def needs_gpu(page: Path) -> bool:
    return page.name == "gpu.md"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_resolve(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [target for target in targets if not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", with_python(), ids=name)
def test_python_blocks_run_in_order(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if needs_gpu(page):
        pytest.skip("its blocks need a CUDA device")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert re.search(r"with confidence \d+%, \d+% of the rows", printed)
        assert re.search(r"most \d\S* of the rms row \((sampled|worst_case)\)", printed)


def test_readme_is_short_and_its_example_is_twelve_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES_MOST
    (example,) = PYTHON.findall(text)
    assert len(example.splitlines()) <= 12


def test_readme_gives_two_commands_and_ci_runs_the_second() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install . && adaattn demo\n" in text
    assert text.count('pip install -e ".[test]"') == 1
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "grep -F 'pip install -e \".[test]\"' README.md" in script.read_text(
        encoding="utf-8"
    )


def test_readme_maps_folders_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = re.findall(r"^\| `([a-z_/]+/)` \|", text, re.MULTILINE)
    assert len(folders) >= 6
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
