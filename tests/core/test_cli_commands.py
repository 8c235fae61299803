"""Commands beside `run`: demo, explain, backends, doctor, those of plugins, and bad usage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from adaattn_core import __version__
from adaattn_core.cli import doctor
from adaattn_core.cli.app import main
from adaattn_core.plan import Plan
from adaattn_core.plugins import hookimpl, registry

Cli = Callable[..., tuple[int, str, str]]


def three_lines(text: str) -> bool:
    return [line.split(":")[0] for line in text.splitlines()] == ["got", "needed", "do this"]


def test_explain_reads_a_plan_aloud(cli: Cli, layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    cli("run", layer, "--save-plan", path)
    plan = Plan.load(path)
    code, out, _ = cli("explain", path)
    assert code == 0
    assert out.rstrip("\n") == plan.explain().rstrip("\n")
    code, out, _ = cli("explain", path, "--json")
    assert code == 0
    assert Plan.from_json(json.loads(out)) == plan


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"adaattn_plan": 99}', "\x00"])
def test_explain_refuses_what_is_not_a_plan(cli: Cli, tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    code, out, err = cli("explain", path)
    assert (code, out) == (2, "")
    assert three_lines(err)


def test_backends_lists_numpy_with_its_capabilities(cli: Cli) -> None:
    code, out, _ = cli("backends", "--json")
    assert code == 0
    found = {row["name"]: row for row in json.loads(out)["backends"]}
    assert found["numpy"]["available"]
    can = found["numpy"]["capabilities"]
    assert "dense" in can["structures"]
    assert [can[name] for name in ("measures", "forwards", "decides")] == [True, False, False]
    code, out, _ = cli("backends")
    assert code == 0
    assert re.search(r"^numpy +numpy +yes", out, re.M)


class _Plugins:
    @staticmethod
    @hookimpl
    def adaattn_register_commands(group: typer.Typer) -> None:
        """Add one command."""

        @group.command("greet")
        def greet() -> None:
            """Say hello."""
            typer.echo("hello from a plugin")

    class Broken:
        @staticmethod
        @hookimpl
        def adaattn_register_commands(group: typer.Typer) -> None:
            """Fail."""
            raise RuntimeError("no such luck")


def test_plugins_add_commands_and_a_broken_one_harms_nobody(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = registry.load_registry()
    plugins.add_plugin("broken", _Plugins.Broken)
    plugins.add_plugin("polite", _Plugins)
    for module in ("adaattn_core.cli.app", "adaattn_core.plugins.registry"):
        monkeypatch.setattr(f"{module}.default_registry", lambda: plugins)
    assert cli("greet") == (0, "hello from a plugin\n", "")
    code, out, _ = cli("backends", "--json")
    assert code == 0
    broken = [row for row in json.loads(out)["backends"] if not row["name"]]
    assert [(row["plugin"], row["reason"]) for row in broken] == [
        ("broken", "RuntimeError: no such luck")
    ]


def test_doctor_finds_this_installation_sound(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--json")
    body = json.loads(out)
    assert code == 0
    assert body["sound"]
    findings = {finding["name"]: finding for finding in body["findings"]}
    assert findings["backend numpy"]["state"] == "ok"
    assert re.fullmatch(
        r"self-test, relative error \d\.\de-\d\d", findings["backend numpy"]["detail"]
    )


def test_doctor_notices_a_backend_that_computes_wrongly(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = doctor.attention

    def one_percent_off(*arrays: Any, **options: Any) -> Any:
        result = honest(*arrays, **options)
        result.out[...] *= 1.01
        return result

    monkeypatch.setattr(doctor, "attention", one_percent_off)
    code, out, _ = cli("doctor")
    assert code == 1
    assert re.search(r"^broken +backend numpy +self-test, relative error 1\.0e-02", out, re.M)


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version") == (0, f"{__version__}\n", "")
    for arguments in ((), ("--help",)):
        code, out, _ = cli(*arguments)
        assert code == 0
        assert all(name in out for name in ("demo", "run", "explain", "backends", "doctor"))


@pytest.mark.parametrize(
    "arguments", [("fly",), ("run",), ("explain",), ("backends", "--yaml")]
)
def test_bad_usage_ends_in_three_lines(cli: Cli, arguments: tuple[str, ...]) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert three_lines(err)


def test_demo_keeps_its_budget_on_real_heads_and_draws(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The NumPy backend measures whatever the machine; others may find dense cheaper.
    code, out, err = cli("demo", "--json", "--backend", "numpy")
    assert (code, err) == (0, "")
    body = json.loads(out)
    heads = body["heads"]
    assert len(heads) == 6
    assert all(head["certificate"]["upper"] <= 0.1 for head in heads)
    # Each certificate may fail with probability 0.05; 3 of 6 failing has probability 0.002.
    assert body["totals"]["coverage"] > 0.5
    assert body["totals"]["share"] < 0.8
    assert body["prediction"]["kind"] == "prediction by a cost model, not a measurement"
    predicted = body["prediction"]
    assert 0 < predicted["plan_seconds"] < predicted["dense_seconds"] < 1e-3
    assert predicted["seconds"] > predicted["plan_seconds"]
    figure = tmp_path / "adaattn-demo.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [figure]


def test_demo_without_matplotlib_says_so(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adaattn_core.cli.demo.can_draw", lambda: False)
    code, out, _ = cli("demo")
    assert code == 0
    assert "no figure: matplotlib is not installed" in out
    assert re.search(
        r"^predicted on sm90, bf16: dense \d+ us, these plans alone \d+ us", out, re.M
    )
    assert "not a measurement" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--figure", "choices.bmp2"),
        ("--figure", "no/such/folder/choices.png"),
        ("--figure", "choices.png", "--no-figure"),
        ("--report", "no/such/folder/page.html"),
        ("--budget", "-1"),
        ("--backend", "no-such-backend"),
    ],
    ids=" ".join,
)
def test_bad_demo_options_end_in_three_lines(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("demo", *options)
    assert (code, out) == (2, "")
    assert three_lines(err)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_asked_for_without_matplotlib_is_an_error(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaattn_core.report.figure.can_draw", lambda: False)
    code, _, err = cli("demo", "--figure", tmp_path / "choices.png")
    assert code == 2
    assert three_lines(err)
    assert "matplotlib" in err


def test_a_bug_says_that_it_is_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy() -> None:
        raise ZeroDivisionError("one by none")

    monkeypatch.setattr("adaattn_core.cli.backends.list_backends", buggy)
    code, out, err = cli("backends")
    assert (code, out) == (70, "")
    assert three_lines(err)
    assert "ZeroDivisionError: one by none" in err
    monkeypatch.setenv("ADAATTN_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["backends"])
