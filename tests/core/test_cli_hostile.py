"""The command line among hostile files and signals: exit codes, three lines, no litter."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from adaattn_core.cli.options import in_flags
from adaattn_core.plan import Plan
from adaattn_core.policies import FixedPolicy

Cli = Callable[..., tuple[int, str, str]]
LEN = 40


def three_lines(text: str) -> bool:
    return [line.split(":")[0] for line in text.splitlines()] == ["got", "needed", "do this"]


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((2, LEN, 8), dtype=np.float32) for name in "qkv"}


@pytest.fixture
def qkv(tmp_path: Path, arrays: dict[str, Any]) -> Path:
    path = tmp_path / "qkv.npz"
    np.savez(path, **arrays)
    return path


# -- files -------------------------------------------------------------------------------------
def npz_of_header(path: Path, header: str) -> None:
    """An .npz whose arrays have this header, whatever it is."""
    text = header.encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"0" * 100
            archive.writestr(f"{name}.npy", member)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999, 99999)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 1, 1)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 3)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 3)}",
        "{'descr': [[[('a')]]], 'fortran_order': False, 'shape': (1, 2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ('a',)}",
        "(" * 1000,
        "\x00",
    ],
)
def test_headers_of_arrays(cli: Cli, tmp_path: Path, header: str) -> None:
    path = tmp_path / "bad.npz"
    npz_of_header(path, header)
    code, out, err = cli("run", path)
    assert (code, out) == (2, "")
    assert three_lines(err)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "method"])
def test_members_that_zip_cannot_unpack(cli: Cli, qkv: Path, offset: int, value: int) -> None:
    data = bytearray(qkv.read_bytes())
    data[data.find(b"PK\x01\x02") + offset] = value
    data[data.find(b"PK\x03\x04") + offset - 2] = value
    qkv.write_bytes(data)
    code, out, err = cli("run", qkv)
    assert (code, out) == (2, "")
    assert three_lines(err)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"adaattn_plan": Infinity}', "\ud800", '{"adaattn_plan": 1e999}']
)
def test_plans_that_are_none(cli: Cli, qkv: Path, text: str) -> None:
    plan = qkv.with_suffix(".json")
    plan.write_bytes(text.encode(errors="surrogatepass"))
    for command in (("explain", plan), ("run", qkv, "--plan", plan)):
        code, out, err = cli(*command)
        assert (code, out) == (2, "")
        assert three_lines(err)


def test_loops_of_links_and_devices(cli: Cli, tmp_path: Path, qkv: Path) -> None:
    loop = tmp_path / "loop.npz"
    loop.symlink_to(loop)
    commands: list[tuple[object, ...]] = [
        ("run", loop),
        ("run", qkv, "--out", loop),
        ("run", qkv, "--report", "/dev/null"),
        ("run", qkv, "--save-plan", "/dev/stdout"),
        ("explain", "/dev/zero"),
        ("explain", "a" * 300),
        ("run", qkv, "--report", "a" * 300),
    ]
    for command in commands:
        code, out, err = cli(*command)
        assert (code, out) == (2, ""), command
        assert three_lines(err)
    assert loop.is_symlink()


def test_output_through_a_link_goes_where_it_points(
    cli: Cli, tmp_path: Path, qkv: Path
) -> None:
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "link.json", tmp_path / "there" / "real.json"
    link.symlink_to(real)
    assert cli("run", qkv, "--save-plan", link)[0] == 0
    assert link.is_symlink()
    assert Plan.load(real).heads
    link = tmp_path / "in.npz"
    link.symlink_to(qkv)
    assert cli("run", qkv, "--out", link)[0] == 2  # the input itself


def test_control_characters_of_a_plan_stay_text(cli: Cli, tmp_path: Path, qkv: Path) -> None:
    nasty = "\x1b]0;title\x07\x1b[31m\u202e\ud800"
    plan = Plan({(0, h): FixedPolicy(reason=nasty).plan for h in range(2)}, policy=nasty)
    path, page = tmp_path / "plan.json", tmp_path / "page.html"
    plan.save(path)
    for command in (
        ("explain", path),
        ("explain", path, "--json"),
        ("run", qkv, "--plan", path, "--report", page),
    ):
        code, out, err = cli(*command)
        assert (code, err) == (0, "")
        assert not {"\x1b", "\x07", "\u202e", "\ud800"} & set(out)
    assert "\\x1b[31m" in cli("explain", path)[1]
    document = json.loads(path.read_text())
    document["heads"][0]["structure"]["kind"] = nasty
    path.write_text(json.dumps(document))
    code, _, err = cli("explain", path)
    assert code == 2
    assert three_lines(err)
    assert "\x1b" not in err


# -- masks -------------------------------------------------------------------------------------
def masked(arrays: dict[str, Any], bias: Any) -> Any:
    q, k, v = (arrays[n].astype(np.float64) for n in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + bias
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = np.nan_to_num(weights)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300) @ v


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(LEN, LEN), (2, LEN, LEN), (1, LEN), (1, 2, LEN, LEN)])
def test_the_mask_of_a_file_counts(
    cli: Cli,
    tmp_path: Path,
    arrays: dict[str, Any],
    suffix: str,
    kind: str,
    causal: bool,
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(1)
    seen = rng.random(shape) < 0.5
    bias = np.where(seen, 0.0, -np.inf)
    mask: Any = seen
    saved, entries = dict(arrays), {}
    if kind != "bool":
        bias = np.where(seen, rng.choice([-1.0, 0.0, 2.5], shape), -np.inf)
        mask = bias.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    if kind == "bfloat16":
        saved = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    path, out = tmp_path / f"in{suffix}", tmp_path / "out.npz"
    if suffix == ".safetensors":
        save_file({**saved, "mask": mask}, path)
    else:
        if kind == "bfloat16":
            entries = {name: x.view(np.uint16) for name, x in saved.items()}
            np.savez(path, **entries, mask=mask.view(np.uint16), dtype="bfloat16")
        else:
            np.savez(path, **saved, mask=mask)
    flag = "--causal" if causal else "--full"
    code, printed, err = cli("run", path, flag, "--budget", "exact", "--out", out, "--json")
    assert (code, err) == (0, "")
    described = json.loads(printed)["settings"]["mask"]
    assert ("boolean" if kind == "bool" else "additive") in described
    if causal:
        bias = bias + np.where(np.tri(LEN, dtype=bool), 0, -np.inf)
    with np.load(out) as file:
        found = file["out"]
    if kind == "bfloat16":
        found = found.view(ml_dtypes.bfloat16).astype(np.float64)
        expected = masked({n: x.astype(np.float64) for n, x in saved.items()}, bias)
        tolerance = 2.0**-7
    else:
        expected, tolerance = masked(arrays, bias), 1e-5
    expected = expected[0] if expected.ndim == 4 else expected
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "entries",
    [
        {"mask": np.ones((LEN, LEN), np.int64)},
        {"mask": np.ones((LEN, LEN), np.uint16)},
        {"mask": np.ones((LEN, LEN), "U1")},
        {"mask": np.ones((LEN, LEN), complex)},
        {"mask": np.ones((LEN, LEN - 1), bool)},
        {"mask": np.ones((2, 2, 1, LEN, LEN), bool)},
        {"attn_mask": np.ones((LEN, LEN), bool)},
        {"attention_mask": np.ones((LEN, LEN), bool)},
        {"bias": np.ones((LEN, LEN), np.float32)},
        {"cu_seqlens": np.array([0, LEN])},
    ],
)
def test_a_mask_that_cannot_count_is_refused(
    cli: Cli, tmp_path: Path, arrays: dict[str, Any], entries: dict[str, Any]
) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, **arrays, **entries)
    code, out, err = cli("run", path)
    assert (code, out) == (2, "")
    assert three_lines(err)


def test_a_bare_array_is_three(cli: Cli, tmp_path: Path, arrays: dict[str, Any]) -> None:
    stacked, single, out = (tmp_path / name for name in ("s.npy", "q.npy", "out.npz"))
    np.save(stacked, np.stack(list(arrays.values())))
    np.save(single, arrays["q"])
    assert cli("run", stacked, "--budget", "exact", "--full", "--out", out)[0] == 0
    with np.load(out) as file:
        np.testing.assert_allclose(file["out"], masked(arrays, 0), atol=1e-5)
    code, _, err = cli("run", single)
    assert code == 2
    assert three_lines(err)
    assert "stacked" in err


# -- words -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        ("--budget", 0),
        ("--budget", -1),
        ("--budget", "nan"),
        ("--budget", "inf"),
        ("--budget", "tight"),
        ("--rows", 2),
        ("--rows", "nan"),
        ("--confidence", 1),
        ("--guarantee", "certain"),
        ("--on-violation", "cry"),
        ("--policy", "x"),
        ("--policy", "calibrated"),
        ("--backend", "x"),
        ("--target", "x"),
        ("--scale", 0),
        ("--scale", "inf"),
        ("--seed", -1),
        ("--seed", 1.5),
        ("--alignment", "x"),
        ("--budget", 1e-12),
        ("--budget", 1e-12, "--on-violation", "raise"),
        ("--policy", "fixed", "--qk", "f64"),
        ("--policy", "fixed", "--qk", "half"),
        ("--policy", "fixed", "--structure", "landmark:tau=2"),
    ],
)
def test_errors_speak_of_options(cli: Cli, qkv: Path, options: tuple[Any, ...]) -> None:
    code, out, err = cli("run", qkv, *options)
    assert (code, out) == (2, "")
    assert three_lines(err)
    for word in ("budget=", "ErrorBudget(", "rel=", "guarantee=", "on_violation=", "backend=",
                 "alignment=", "scale=", "seed=", "policy="):  # fmt: skip
        assert word not in err


def test_arguments_become_options() -> None:
    text = 'pass budget=None, ErrorBudget(rel=0.05), on_violation="escalate", backend="auto"'
    assert in_flags(text) == (
        "pass --budget exact, --budget 0.05, --on-violation escalate, --backend auto"
    )


def test_a_mistyped_plugin_is_named(tmp_path: Path, qkv: Path) -> None:
    command = [sys.executable, "-m", "adaattn_core.cli", "run", str(qkv)]
    for value, part in (("numyp", "'numyp'"), ("numpy,cdua", "'cdua'"), ("", "unset")):
        environment = {**os.environ, "ADAATTN_LOAD_PLUGINS": value}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert three_lines(done.stderr)
        assert "ADAATTN_LOAD_PLUGINS" in done.stderr
        assert part in done.stderr


# -- streams and signals -----------------------------------------------------------------------
posix = pytest.mark.skipif(os.name != "posix", reason="signals and streams of POSIX")


@posix
def test_a_reader_that_leaves(qkv: Path) -> None:
    script = (
        f"{sys.executable} -m adaattn_core.cli run {qkv} --json | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "141"
    assert done.stderr == ""


@posix
@pytest.mark.parametrize("stream", [">&-", "> /dev/full"])
def test_an_output_that_takes_nothing(qkv: Path, stream: str) -> None:
    if "full" in stream and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    script = f"{sys.executable} -m adaattn_core.cli run {qkv} {stream}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert three_lines(done.stderr)


@posix
def test_characters_that_a_terminal_lacks(qkv: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for file in (qkv, qkv.with_name("caf\u00e9.npz")):
        if file != qkv:
            qkv.rename(file)
        command = [sys.executable, "-m", "adaattn_core.cli", "run", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


SLOW_WRITER = """
import sys, time
import numpy as np
from adaattn_core.cli import outputs
from adaattn_core.cli.app import main

def slow(stream, **arrays):
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    time.sleep(60)

np.savez = slow
main(sys.argv[1:])
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_during_a_write_leaves_no_litter(
    tmp_path: Path, qkv: Path, number: signal.Signals
) -> None:
    out = tmp_path / "results" / "out.npz"
    out.parent.mkdir()
    command = [sys.executable, "-c", SLOW_WRITER, "run", str(qkv), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert list(out.parent.iterdir())
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert not list(out.parent.iterdir())
