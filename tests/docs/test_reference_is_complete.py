"""What the code names, the reference names too."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer

from adaattn_core import errors
from adaattn_core.cli.app import build_app
from adaattn_core.costs import COST_MODELS
from adaattn_core.formats import FORMATS
from adaattn_core.plugins import hookspecs

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
SOURCE_ROOTS = ("adaattn_core", "reference", "backends", "kernels_cu")
BUILT_IN_COMMANDS = ("demo", "run", "explain", "backends", "doctor")


def reference(page: str) -> str:
    return (REFERENCE / page).read_text(encoding="utf-8")


def error_classes() -> list[type[errors.AdaAttnError]]:
    found = [
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if c.__module__ == errors.__name__
    ]
    return [c for c in found if c is not errors.AdaAttnError]


def hooks() -> dict[str, inspect.Signature]:
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {n: inspect.signature(f) for n, f in functions if n.startswith("adaattn_")}


def variables() -> set[str]:
    texts = (
        path.read_text(encoding="utf-8")
        for root in SOURCE_ROOTS
        for path in (ROOT / root).rglob("*.py")
    )
    return {name for text in texts for name in re.findall(r"\bADAATTN_[A-Z_]*[A-Z]\b", text)}


def test_there_is_something_to_document() -> None:
    assert len(error_classes()) >= 10
    assert len(hooks()) == 3
    assert "ADAATTN_LOAD_PLUGINS" in variables()


@pytest.mark.parametrize("error", error_classes(), ids=lambda c: c.__name__)
def test_every_error_is_in_the_table_with_its_standard_base(
    error: type[errors.AdaAttnError],
) -> None:
    standard = error.__bases__[1].__name__
    row = rf"^\| `{error.__name__}` \| `{standard}` \| \S"
    assert re.search(row, reference("errors.md"), re.MULTILINE)


@pytest.mark.parametrize("name", hooks())
def test_every_hook_is_in_the_table_with_its_arguments(name: str) -> None:
    arguments = ", ".join(hooks()[name].parameters)
    assert f"| `{name}({arguments})` |" in reference("hooks.md")


@pytest.mark.parametrize("name", sorted(variables()))
def test_every_environment_variable_is_in_the_reference(name: str) -> None:
    pages = (path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md"))
    assert any(f"`{name}`" in page or f"`{name}=" in page for page in pages)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_in_the_table_with_its_bits(name: str) -> None:
    info = FORMATS[name]
    assert f"| `{name}` | {info.bits} | {info.significand_bits} |" in reference("formats.md")


@pytest.mark.parametrize("command", BUILT_IN_COMMANDS)
def test_every_option_of_every_command_is_in_its_section(command: str) -> None:
    group = typer.main.get_command(build_app())
    sections = re.split(r"^## ", reference("cli.md"), flags=re.MULTILINE)
    (section,) = (s for s in sections if s.startswith(f"`adaattn {command}"))
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    options = [
        o for p in parameters for o in (*p.opts, *p.secondary_opts) if o.startswith("--")
    ]
    missing = [option for option in options if f"`{option}`" not in section]
    assert options
    assert not missing


def test_every_option_and_file_of_the_kit_is_in_its_page() -> None:
    page = reference("conformance-kit.md")
    plugin = ROOT / "adaattn_core" / "testing" / "pytest_plugin.py"
    options = set(re.findall(r'"(--adaattn-[a-z]+)"', plugin.read_text(encoding="utf-8")))
    files = {p.name for p in (plugin.parent / "conformance").glob("test_*.py")}
    assert len(options) >= 2
    assert len(files) >= 4
    assert [name for name in options | files if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("name", COST_MODELS)
def test_every_target_is_in_the_table(name: str) -> None:
    assert f"| `{name}` |" in reference("targets.md")
