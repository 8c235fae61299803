"""What the code names, the reference names too."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer

import adaattn_core
import adaattn_torch
from adaattn_core import errors
from adaattn_core.cli.app import build_app
from adaattn_core.costs import COST_MODELS
from adaattn_core.formats import FORMATS
from adaattn_core.plugins import hookspecs

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
SOURCE_ROOTS = ("adaattn_core", "reference", "backends", "kernels_cu", "benchmarks")


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
    assert len(hooks()) == 4
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


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command that is installed with AdaAttn, subcommands by their full name."""
    found: dict[str, typer.core.TyperCommand] = {}

    def walk(command: typer.core.TyperCommand, name: str) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name] = command
        for word, child in (inner or {}).items():
            walk(child, f"{name} {word}")

    walk(typer.main.get_command(build_app()), "adaattn")
    return found


def said_of(command: str) -> str:
    """The section about a command, or its row in a table of commands."""
    for page in REFERENCE.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for section in re.split(r"^## ", text, flags=re.MULTILINE):
            if re.match(rf"`{command}[` ]", section):
                return section
        for line in text.splitlines():
            if re.match(rf"\| `{command}[` ]", line):
                return line
    return ""


def test_the_commands_of_plugins_are_among_them() -> None:
    assert {"adaattn run", "adaattn kernels", "adaattn cache clear"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_every_option_of_every_command_is_in_the_reference(command: str) -> None:
    said = said_of(command)
    assert said, f"no section or table row of docs/reference is about {command}"
    missing = []
    for parameter in commands()[command].params:
        first, *others = (*parameter.opts, *parameter.secondary_opts)
        others = [o for o in others if o != first.replace("--", "--no-", 1)]  # implied
        names = [o for o in (first, *others) if o.startswith("--")]
        missing += [o for o in names if not re.search(rf"(?<![\w-]){o}(?![\w-])", said)]
    assert not missing


def public_names() -> list[tuple[str, str, str]]:
    """Package, name, and full name of where it is defined, of everything that is exported."""
    found = []
    for package in (adaattn_core, adaattn_torch):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.append(
                    (package.__name__, name, f"{thing.__module__}.{thing.__qualname__}")
                )
    return found


def directives(page: str) -> set[str]:
    """Full names that a page documents; ``module.*`` where a directive takes all members."""
    found = set()
    rule = r"^\.\. auto(class|function|module):: (\S+)\n((?:   :.*\n)*)"
    for kind, name, options in re.findall(rule, reference(page), re.MULTILINE):
        listed = re.search(r":members:(.*)", options)
        if kind != "module":
            found.add(name)
        elif listed and listed[1].strip():
            found |= {f"{name}.{member.strip()}" for member in listed[1].split(",")}
        elif listed:
            found.add(f"{name}.*")
    return found


@pytest.mark.parametrize(("package", "name", "place"), public_names())
def test_every_public_name_is_in_the_reference(package: str, name: str, place: str) -> None:
    """By a directive of its own, or one for all members of its module."""
    pages = {"adaattn_core": ("api.md", "errors.md"), "adaattn_torch": ("torch.md",)}[package]
    documented = set().union(*map(directives, pages))
    module, _, short = place.rpartition(".")
    packages = {f"{module}.*", f"{module.rpartition('.')[0]}.*"}  # or imported members
    wanted = {place, f"{package}.{name}", f"{module}.{short}"} | packages
    assert documented & wanted


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
