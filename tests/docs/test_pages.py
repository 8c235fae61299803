"""Pages: links resolve, what they show runs, the README keeps its promises."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adaattn_core.cli.app import build_app

sys.path.insert(0, str(Path(__file__).parent))
from pages import DOCS, PAGES, ROOT, Block, blocks, commands, name

LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
README_LINES_MOST = 130
SLOW_COMMANDS = ("demo", "kernels", "warmup", "bench", "eval")
"""Not run here: each has tests of its own. Their options are checked all the same."""


def with_code(kind: str) -> list[Path]:
    return [page for page in PAGES if any(block.kind == kind for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_resolve(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [target for target in targets if not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", with_code("python"), ids=name)
def test_what_a_page_shows_runs_in_order(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.kind == "console":
            run_commands(block, tmp_path)
            continue
        code = compile(block.text, str(page), "exec")
        if not block.needs:
            exec(code, namespace)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert re.search(r"with confidence \d+%, \d+% of the rows", printed)
        assert re.search(r"most \d\S* of the rms row \((sampled|worst_case)\)", printed)


def run_commands(block: Block, folder: Path) -> None:
    """Run those `adaattn` commands whose input the page has made, or that need none."""
    for words in commands(block.text):
        if words[0] != "adaattn" or words[1] in SLOW_COMMANDS or block.needs:
            continue
        reads = words[2] if words[1] in ("run", "explain") else ""
        if reads and not (folder / reads).exists():
            continue
        outcome = CliRunner().invoke(build_app(), words[1:])
        assert outcome.exit_code == 0, (
            f"{' '.join(words)}: {outcome.output} {outcome.exception}"
        )


@pytest.mark.parametrize("page", with_code("console"), ids=name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    group = typer.main.get_command(build_app())
    for block in blocks(page):
        for words in commands(block.text):
            if words[0] == "adaattn" and not words[1].startswith("-"):
                command = find(group, words[1:])
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                asked = {word.split("=")[0] for word in words if word.startswith("-")}
                assert asked - known <= {"--help"}, words
            elif words[0] in ("python", "python3") and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), words
            elif words[0] == "pytest":
                paths = [w for w in words[1:] if w.startswith("tests/")]
                assert all((ROOT / path).exists() for path in paths), words


def find(group: object, words: list[str]) -> typer.core.TyperCommand:
    """The command, or subcommand, that a command line names."""
    found = group.commands[words[0]]  # type: ignore[attr-defined]
    return find(found, words[1:]) if hasattr(found, "commands") else found


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


def test_every_page_is_reached_from_the_index() -> None:
    """By a table of contents: Sphinx warns of others, unless a page says that it is none."""
    orphans = [
        name(page)
        for page in PAGES
        if page.is_relative_to(DOCS) and ":orphan:" in page.read_text(encoding="utf-8")
    ]
    assert not orphans
