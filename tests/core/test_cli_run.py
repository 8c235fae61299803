"""``adaattn run``: what it prints is what is true, and bad input ends in three lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adaattn_core.plan import Plan

Cli = Callable[..., tuple[int, str, str]]
LEN, DIM, HEADS_Q, HEADS_KV = 512, 32, 4, 2  # of the fixture `layer`
ROWS = 0.9


def exact_out(layer: Path) -> np.ndarray[Any, Any]:
    """Causal attention of the file, written down independently of the project."""
    with np.load(layer) as file:
        q, k, v = (file[n].astype(np.float64) for n in "qkv")
        scale = float(file["scale"])
    out = np.empty((HEADS_Q, LEN, DIM))
    for head in range(HEADS_Q):
        kv = head // (HEADS_Q // HEADS_KV)
        scores = scale * q[head] @ k[kv].T
        scores[np.triu_indices(LEN, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[head] = weights / weights.sum(axis=1, keepdims=True) @ v[kv]
    return out


def three_lines(text: str) -> bool:
    return [line.split(":")[0] for line in text.splitlines()] == ["got", "needed", "do this"]


def test_run_reports_the_true_errors_of_what_it_wrote(
    cli: Cli, layer: Path, tmp_path: Path
) -> None:
    written = tmp_path / "out.npz"
    options = (
        "--budget",
        0.2,
        "--rows",
        ROWS,
        "--measure",
        "--seed",
        3,
        "--out",
        written,
        "--json",
    )
    code, out, err = cli("run", layer, *options)
    assert (code, err) == (0, "")
    body = json.loads(out)
    with np.load(written) as file:
        returned, lse = file["out"].astype(np.float64), file["lse"]
    assert returned.shape == (HEADS_Q, LEN, DIM)
    assert lse.shape == (HEADS_Q, LEN)
    exact = exact_out(layer)
    assert [(h["batch"], h["head"]) for h in body["heads"]] == [(0, i) for i in range(HEADS_Q)]
    for head, row in enumerate(body["heads"]):
        error = np.linalg.norm(returned[head] - exact[head], axis=1)
        rms = np.sqrt((returned[head] ** 2).sum() / LEN)
        frobenius = np.linalg.norm(error) / np.linalg.norm(exact[head])
        assert row["measured"] == pytest.approx(frobenius, rel=1e-6, abs=1e-9)
        quantile = np.quantile(error / rms, row["certificate"]["rows"], method="inverted_cdf")
        assert row["measured_rows"] == pytest.approx(quantile, rel=1e-6, abs=1e-9)
        assert row["certificate"]["upper"] <= 0.2
        assert row["certificate"]["rows"] >= ROWS
    total = body["totals"]
    assert total["worst_measured"] == max(row["measured"] for row in body["heads"])
    covered = [row["measured_rows"] <= row["certificate"]["upper"] for row in body["heads"]]
    assert total["coverage"] == np.mean(covered)
    assert total["share"] == pytest.approx(np.mean([row["share"] for row in body["heads"]]))
    assert total["dense_seconds"] > 0
    assert total["seconds"] > 0


def test_run_json_has_the_documented_keys_and_null_where_nothing_was_measured(
    cli: Cli, layer: Path
) -> None:
    code, out, _ = cli("run", layer, "--json")
    body = json.loads(out)
    assert code == 0
    assert set(body) == {"heads", "totals", "settings", "provenance"}
    head = {"batch", "head", "structure", "qk", "pv", "rank", "share", "certificate"}
    head |= {"measured", "measured_rows"}
    assert head <= set(body["heads"][0])
    certificate = {"guarantee", "upper", "rows", "confidence", "estimate"}
    assert certificate <= set(body["heads"][0]["certificate"])
    totals = {"share", "seconds", "dense_seconds", "coverage", "worst_measured"}
    assert set(body["totals"]) == totals
    unknown = ("dense_seconds", "coverage", "worst_measured")
    assert [body["totals"][name] for name in unknown] == [None] * 3
    assert body["heads"][0]["measured"] is None


def test_exact_run_is_exact(cli: Cli, layer: Path, tmp_path: Path) -> None:
    written = tmp_path / "out.safetensors"
    code, out, _ = cli(
        "run", layer, "--budget", "exact", "--measure", "--out", written, "--json"
    )
    assert code == 0
    worst = json.loads(out)["totals"]["worst_measured"]
    assert worst < 1e-5  # float32 arithmetic over 512 keys
    returned = load_file(written)["out"].astype(np.float64)
    exact = exact_out(layer)
    assert np.linalg.norm(returned - exact) <= 2 * worst * np.linalg.norm(exact)


def test_saved_plan_replays_bit_for_bit(cli: Cli, layer: Path, tmp_path: Path) -> None:
    plan, first, second = (tmp_path / name for name in ("plan.json", "a.npz", "b.npz"))
    assert cli("run", layer, "--save-plan", plan, "--out", first)[0] == 0
    assert cli("run", layer, "--plan", plan, "--out", second)[0] == 0
    with np.load(first) as a, np.load(second) as b:
        assert np.array_equal(a["out"], b["out"])
    assert Plan.load(plan).layer == "layer07"


def test_fixed_policy_runs_what_it_is_told(cli: Cli, layer: Path) -> None:
    told = ("--structure", "landmark:tau=0.3,band=64,tile=64,group=256", "--qk", "bf16")
    code, out, _ = cli(
        "run", layer, "--policy", "fixed", *told, "--on-violation", "report", "--json"
    )
    assert code == 0
    heads = json.loads(out)["heads"]
    assert {(h["structure"], h["qk"], h["pv"]) for h in heads} == {("landmark", "bf16", "f32")}
    assert all(head["share"] < 1 for head in heads)


def test_calibrated_policy_reads_plans_by_layer(cli: Cli, layer: Path, tmp_path: Path) -> None:
    plan, again = tmp_path / "layer07.json", tmp_path / "again.json"
    assert cli("run", layer, "--save-plan", plan)[0] == 0
    options = ("--policy", "calibrated", "--calibration", tmp_path, "--save-plan", again)
    assert cli("run", layer, *options)[0] == 0
    assert Plan.load(again).heads == Plan.load(plan).heads
    assert Plan.load(again).policy == "calibrated"


def test_batch_axis_of_the_file_comes_back(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, 64, 16), dtype=np.float32) for _ in range(3))
    path, written = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(path, q=q, k=k, v=v)
    code, out, _ = cli("run", path, "--full", "--budget", "exact", "--out", written, "--json")
    assert code == 0
    assert [(h["batch"], h["head"]) for h in json.loads(out)["heads"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    with np.load(written) as file:
        assert file["out"].shape == (2, 2, 64, 16)
        assert file["lse"].shape == (2, 2, 64)


def test_alignment_is_asked_for_where_lengths_differ(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 3, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 64, 16), dtype=np.float32)
    path = tmp_path / "in.npz"
    np.savez(path, q=q, k=k, v=v)
    code, _, err = cli("run", path, "--budget", "exact")
    assert code == 2
    assert three_lines(err)
    assert "alignment" in err
    assert cli("run", path, "--budget", "exact", "--alignment", "bottom_right")[0] == 0


def test_table_names_every_head_and_sums_up(cli: Cli, layer: Path) -> None:
    code, out, _ = cli("run", layer, "--budget", 0.2, "--measure")
    assert code == 0
    rows = re.findall(r"^ *(\d) +(dense|score_skip|low_rank|block_sparse|landmark)", out, re.M)
    assert [int(head) for head, _ in rows] == list(range(HEADS_Q))
    assert re.search(r"\d+\.\d% of the visible scores computed, \d+\.\d\d s; exact on", out)


def test_report_is_one_page_without_links_outside(
    cli: Cli, layer: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert cli("run", layer, "--measure", "--report", page)[0] == 0
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert len(re.findall(r'<tr data-key="layer07/0/\d">', text)) == HEADS_Q
    assert not re.search(r"src=|https?://|href=\"[^#]", text)


def test_a_page_compares_with_an_earlier_run(cli: Cli, layer: Path, tmp_path: Path) -> None:
    first, second, told = (tmp_path / name for name in ("a.html", "b.html", "a.json"))
    code, out, _ = cli("run", layer, "--budget", 0.2, "--report", first, "--json")
    assert code == 0
    told.write_text(out)
    for earlier in (first, told):
        options = ("--budget", "exact", "--report", second, "--compare", earlier)
        assert cli("run", layer, *options)[0] == 0
        assert f"of {HEADS_Q} heads are computed in another way now" in second.read_text()
    assert cli("run", layer, "--report", second, "--compare", layer)[0] == 2
    assert cli("run", layer, "--compare", told)[0] == 2


def test_names_are_escaped_in_the_report(cli: Cli, layer: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<b>&.npz"
    odd.write_bytes(layer.read_bytes())
    page = tmp_path / "report.html"
    assert cli("run", odd, "--report", page)[0] == 0
    assert "&lt;b&gt;&amp;.npz" in page.read_text()
    assert "<b>&" not in page.read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "-1"),
        ("--budget", "0"),
        ("--budget", "nan"),
        ("--budget", "inf"),
        ("--budget", "tight"),
        ("--budget", "exact", "--rows", "0.9"),
        ("--budget", "exact", "--on-violation", "raise"),
        ("--rows", "1.5"),
        ("--rows", "many"),
        ("--confidence", "0"),
        ("--confidence", "1"),
        ("--guarantee", "certain"),
        ("--on-violation", "ignore"),
        ("--policy", "no-such-policy"),
        ("--policy", "calibrated"),
        ("--policy", "calibrated", "--calibration", "no-such-plan.json"),
        ("--calibration", "plan.json"),
        ("--qk", "bf16"),
        ("--policy", "fixed", "--qk", "half"),
        ("--policy", "fixed", "--structure", "magic"),
        ("--policy", "fixed", "--structure", "landmark:tau=big"),
        ("--policy", "fixed", "--structure", "landmark:tau=2"),
        ("--policy", "fixed", "--structure", "landmark:colour=2"),
        ("--target", "no-such-machine"),
        ("--backend", "no-such-backend"),
        ("--alignment", "left"),
        ("--full", "--alignment", "top_left"),
        ("--scale", "-1"),
        ("--plan", "no-such-plan.json"),
        ("--seed", "one"),
        ("--seed", "-1"),
        ("--no-such-option",),
        ("--out", "out.txt"),
        ("--out", "no/such/folder/out.npz"),
        ("--save-plan", "no/such/folder/plan.json"),
        ("--report", "no/such/folder/report.html"),
    ],
    ids=" ".join,
)
def test_bad_options_end_in_three_lines_and_leave_nothing_behind(
    cli: Cli,
    layer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = options if "--out" in options else (*options, "--out", "out.npz")
    code, out, err = cli("run", layer, *given)
    assert code == 2
    assert out == ""
    assert three_lines(err)
    assert list(tmp_path.iterdir()) == []


def test_an_output_never_replaces_the_input_or_another_output(
    cli: Cli, layer: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "layer.npz"
    mine.write_bytes(layer.read_bytes())
    for options in (
        ("--out", mine),
        ("--save-plan", tmp_path / "a", "--report", tmp_path / "a"),
    ):
        code, _, err = cli("run", mine, *options)
        assert code == 2
        assert three_lines(err)
    assert mine.read_bytes() == layer.read_bytes()
    assert list(tmp_path.iterdir()) == [mine]


def test_brackets_in_a_name_are_no_markup(cli: Cli, layer: Path, tmp_path: Path) -> None:
    odd = tmp_path / "[red]a[b].npz"
    odd.write_bytes(layer.read_bytes())
    code, out, _ = cli("run", odd)
    assert code == 0
    assert "[red]a[b].npz" in out.replace("\n", "")


def test_bad_file_ends_in_three_lines(cli: Cli, tmp_path: Path) -> None:
    for name, content in (("a.npz", b"text"), ("a.safetensors", b""), ("a.csv", b"1,2")):
        (tmp_path / name).write_bytes(content)
        code, _, err = cli("run", tmp_path / name)
        assert code == 2
        assert three_lines(err)
        assert name in err


def test_a_failure_while_writing_leaves_nothing_behind(
    cli: Cli, layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    code, _, err = cli("run", layer, "--out", tmp_path / "out.npz")
    assert code == 2
    assert three_lines(err)
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_input_is_reported_not_hidden(cli: Cli, layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "layer.npz"
    with np.load(layer) as file:
        arrays = {name: file[name] for name in "qkv"}
    arrays["v"][0, 5, 0] = np.nan
    np.savez(path, **arrays)
    code, out, _ = cli("run", path, "--measure", "--json")
    assert code == 0
    heads = json.loads(out)["heads"]
    touched = [head["certificate"]["nonfinite"] for head in heads]
    assert touched == [True, True, False, False]
    assert heads[0]["certificate"]["upper"] is None
    assert heads[0]["measured"] is None
    assert heads[3]["certificate"]["upper"] is not None
