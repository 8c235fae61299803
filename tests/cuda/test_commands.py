"""The commands, run through the same application that `adaattn` builds."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from adaattn_core.errors import UnsupportedError
from adaattn_cuda import commands, plugin
from adaattn_cuda.jit.compile import Built
from adaattn_cuda.jit.resources import Resources
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels import shipped
from adaattn_cuda.tuning.sm80_attn_fwd import specialise

runner = CliRunner()
SPECS = [
    specialise("sm_80", "bf16", "bf16", "bf16", 64, 64).spec("sm_80"),
    specialise("sm_80", "f32", "tf32", "tf32", 64, 64).spec("sm_80"),
]


@pytest.fixture
def app() -> typer.Typer:
    group = typer.Typer()
    plugin.adaattn_register_commands(group)
    return group


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "specs", lambda arch: SPECS)


@pytest.mark.nvrtc
@pytest.mark.usefixtures("two_kernels")
def test_kernels_warmup_and_cache(app: typer.Typer) -> None:
    found = runner.invoke(app, ["kernels", "--arch", "sm_80", "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["kernels"]
    assert [row["name"] for row in rows] == [spec.name for spec in SPECS]
    for row, spec in zip(rows, SPECS, strict=True):
        assert set(row) == {
            "name", "arch", "registers", "spill_bytes", "smem_bytes", "seconds"
        }  # fmt: skip
        assert row["spill_bytes"] == 0
        assert row["smem_bytes"] == spec.smem_bytes
        assert 0 < row["registers"] <= 255
        assert row["seconds"] > 0

    said: list[str] = []
    plugin.adaattn_warm_up(said.append, "sm_80", 2)
    assert sum(line.endswith("cached") for line in said) == 2, "kernels had filled the cache"
    listed = json.loads(runner.invoke(app, ["cache", "ls", "--json"]).stdout)["entries"]
    assert sorted(row["name"] for row in listed) == sorted(spec.name for spec in SPECS)
    assert "removed 2" in runner.invoke(app, ["cache", "clear"]).output
    assert json.loads(runner.invoke(app, ["cache", "ls", "--json"]).stdout)["entries"] == []


@pytest.mark.usefixtures("two_kernels")
@pytest.mark.parametrize(
    ("resources", "text"),
    [(Resources(255, 8, 8), "spill_bytes is 8"), (Resources(256, 0, 0), "registers is 256")],
)
def test_kernels_fail_on_a_spill_or_an_exceeded_budget(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, resources: Resources, text: str
) -> None:
    def pretend(spec: KernelSpec, **_: object) -> Built:
        return Built(spec, b"", resources, 0.1, False)

    monkeypatch.setattr(commands, "build", pretend)
    found = runner.invoke(app, ["kernels", "--arch", "sm_80", "--json"])
    assert found.exit_code == 1
    assert text in found.stderr
    assert len(json.loads(found.stdout)["violations"]) == 2


def test_cache_path(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_CACHE_DIR", "/somewhere")
    assert runner.invoke(app, ["cache", "path"]).output.strip() == "/somewhere/v1"


def test_unknown_architecture(app: typer.Typer) -> None:
    with pytest.raises(UnsupportedError, match="sm_75"):
        runner.invoke(app, ["kernels", "--arch", "sm_75"], catch_exceptions=False)


@pytest.mark.usefixtures("no_driver")
def test_warmup_without_a_device_names_the_option() -> None:
    said: list[str] = []
    plugin.adaattn_warm_up(said.append, None, 2)
    assert len(said) == 1
    assert "no CUDA driver" in said[0]
    assert "--arch sm_90a" in said[0]
