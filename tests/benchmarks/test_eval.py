"""``adaattn eval``: tasks on a tiny model made here, shipped heads, ablations, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from adaattn_bench import ablations, evaluation, tasks, texts
from adaattn_bench.ablations import Layer, ablate
from adaattn_bench.models import EXACT, TORCH, Setting, load
from adaattn_bench.policies import PARTS, Without, unhurried
from adaattn_core.budget import ErrorBudget
from adaattn_core.cli.app import build_app
from adaattn_core.structure import Landmark

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with random weights, and a tokenizer of single bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_only = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    )
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(str(folder))


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Heads with local attention, long enough that there is something to leave out."""
    rng = np.random.default_rng(1)
    length, dim = 1024, 32
    key = rng.standard_normal((1, 1, length, dim)).cumsum(axis=2)
    key *= 8 / np.linalg.norm(key, axis=-1, keepdims=True)
    query = np.repeat(key, 2, axis=1) + rng.standard_normal((1, 2, length, dim)) / 4
    value = rng.standard_normal((1, 1, length, dim))
    return Layer.of("7", *(x.astype(np.float32) for x in (query, key, value)), 0.3)


SMALL = (
    "--device", "cpu", "--budgets", "0.2", "--tokens", 48, "--windows", 2,
    "--lengths", "160,200", "--depths", "0.2,0.8", "--prompt-tokens", 16,
    "--greedy-tokens", 4, "--questions", 2, "--context-tokens", 32,
    "--head-tokens", 64, "--ablation-layers", 1,
)  # fmt: skip


# --- the command ------------------------------------------------------------------------------
def test_a_folder_is_evaluated_in_every_part(cli: Any, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "eval.html"
    code, out, err = cli(
        "eval", "--model", folder, *SMALL, "--out", tmp_path / "out", "--report", page, "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["cut_short"] == []
    columns = [TORCH, EXACT, "0.2"]
    for by in report["perplexity"].values():
        assert list(by) == columns
        for row in by.values():
            assert len(row["windows"]) == 2
            mean = math.exp(sum(row["windows"]) / 2)
            assert row["perplexity"] == pytest.approx(mean, rel=1e-3)
            # The same float32 model: sums in another order, and a budget of a fifth.
            assert row["perplexity"] == pytest.approx(by[TORCH]["perplexity"], rel=0.05)
    for found in report["needle"].values():
        places = [(r["length"], r["depth"]) for r in found]
        assert places == [(n, d) for n in (160, 200) for d in (0.2, 0.8)]
    assert report["greedy"][EXACT]["agreement"] == 1.0
    assert [report["choices"][c]["asked"] for c in columns] == [2, 2, 2]
    assert {(h["layer"], h["head"]) for h in report["heads"]} == {
        (layer, head) for layer in "01" for head in range(4)
    }
    assert [row["part"] for row in report["ablations"]] == [ablations.WHOLE, *PARTS]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "eval.md").read_text()
    titles = ("Perplexity", "Needle", "Greedy text", "Multiple choice", "Single heads")
    assert all(f"## {title}\n" in text for title in (*titles, "Ablations"))
    html = page.read_text()
    assert html.index("<svg") < html.index("<table")
    assert html.count("<svg") == 1 + 3 + 3 + 3  # perplexity, needles, heads, ablations


def test_shipped_heads_need_no_model(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> Any:
        raise AssertionError("no model was asked for")

    monkeypatch.setattr(evaluation, "load", absent)
    options = ("--heads", "demo", "--head-tokens", 256, "--parts", "heads", "--budgets", "0.1")
    code, out, _ = cli("eval", "--device", "cpu", *options)
    assert code == 0
    assert re.search(r"^heads +6$", out, re.M)
    assert re.search(r"^coverage: .* \d+\.\d%$", out, re.M)


def test_ctrl_c_keeps_what_there_is(
    cli: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "needle", impatient)
    code, out, _ = cli(
        "eval", "--model", folder, *SMALL, "--parts", "perplexity,needle,heads", "--json"
    )
    assert code == 130
    report = json.loads(out)
    assert report["cut_short"] == ["needle: interrupted"]
    assert set(report["perplexity"]) == {"prose", "code"}
    assert "heads" not in report


def test_nothing_is_begun_after_the_deadline(cli: Any) -> None:
    options = ("--heads", "demo", "--parts", "heads,ablations", "--seconds", 0, "--json")
    code, out, _ = cli("eval", "--device", "cpu", *options)
    assert code == 0
    assert json.loads(out)["cut_short"] == ["heads: no time left", "ablations: no time left"]


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "no/such/folder"), ("--parts", "poetry"), ("--depths", "2"),
        ("--heads", "tails"), ("--target", "sm42"), ("--budgets", "-1"), ("--lengths", "x"),
        ("--text", "no-such-file", "--parts", "perplexity"), ("--report", "no/where/x.html"),
        ("--heads", "demo", "--parts", "heads", "--head-tokens", "9000"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_options_end_in_three_lines(
    cli: Any, folder: Path, options: tuple[str, ...]
) -> None:
    model = () if "--model" in options else ("--model", folder)
    code, out, err = cli("eval", "--device", "cpu", *model, *options)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 3


def test_a_damaged_model_is_refused(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    code, _, err = cli("eval", "--device", "cpu", "--model", tmp_path)
    assert code == 2
    assert len(err.strip().splitlines()) == 3


def test_every_option_is_in_the_reference() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text("utf-8")
    sections = re.split(r"^## ", text, flags=re.M)
    group: Any = typer.main.get_command(build_app())
    (section,) = (s for s in sections if s.startswith("`adaattn eval"))
    names = [o for p in group.commands["eval"].params for o in (*p.opts, *p.secondary_opts)]
    assert [n for n in names if n.startswith("--") and f"`{n}`" not in section] == []


# --- tasks ------------------------------------------------------------------------------------
def test_perplexity_is_that_of_the_formula(model: Any) -> None:
    ids = model.encode("windows are read one by one, each without what stands before it", 60)
    windows = ids.split(30)
    got = tasks.perplexity(model, Setting(TORCH), windows)["perplexity"]
    nats = []
    for window in windows:
        with torch.no_grad():
            logits = model.network(window[None]).logits[0].double()
        logs = torch.log_softmax(logits, -1)
        nats += [-float(logs[i, window[i + 1]]) for i in range(len(window) - 1)]
    assert got == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)


def test_the_needle_stands_at_its_depth(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(ids: Any, setting: Any) -> Any:
        seen.append(model.tokenizer.decode(ids))
        logits = torch.zeros(len(ids), 256)
        logits[torch.arange(len(ids) - 1), ids[1:]] = 50.0  # knows what comes next
        return logits, {}

    prose = model.encode("x" * 400)
    whole = type("Model", (), {"encode": model.encode, "logits": staticmethod(spy)})()
    row = tasks.needle(whole, Setting(TORCH), prose, 300, 0.25)
    assert len(seen[0]) == 300
    assert seen[0].endswith(f" {tasks.CODE}")
    before = seen[0].index(tasks.NEEDLE)
    room = 300 - len(tasks.NEEDLE) - len(tasks.QUESTION) - len(tasks.CODE) - 1
    assert before == int(0.25 * room)
    assert row["right"] == row["tokens"] == len(tasks.CODE) + 1
    assert row["nats"] < 1e-6


def test_the_right_paragraph_is_told_from_the_others() -> None:
    asked = texts.questions(30, seed=1)
    again = texts.questions(30, seed=1)
    assert asked == again
    assert len({q.context for q in asked}) == 30
    assert {q.right for q in asked} == set(range(texts.CHOICES))
    prose = texts.prose()
    for question in asked:
        assert len(set(question.choices)) == texts.CHOICES
        flat = " ".join((question.context[-200:] + question.choices[question.right]).split())
        assert flat in " ".join(prose.split())


def test_built_in_texts_are_long_and_need_no_network() -> None:
    for name in texts.BUILT_IN:
        assert len(texts.read_text(name)) > 300_000


# --- ablations --------------------------------------------------------------------------------
def test_each_part_is_really_off(layer: Layer) -> None:
    budget = ErrorBudget(rel=0.1)

    def plans(part: str) -> list[Any]:
        result = layer.run(budget, Without(part), target="sm90", seed=0)
        return [result.plan[index] for index in result.plan]

    whole = plans("")
    assert any(isinstance(plan.structure, Landmark) for plan in whole)
    assert {p.structure.kind for p in plans("structure")} == {"dense"}
    assert not any(isinstance(p.structure, Landmark) for p in plans("landmarks"))
    assert not any(p.structure.kind == "score_skip" for p in plans("skip rule"))
    assert {(p.qk, p.pv) for p in plans("precision")} == {("f32", "f32")}
    assert not any(p.smooth_k for p in plans("smoothing"))
    dropped = [p.structure for p in plans("pools") if isinstance(p.structure, Landmark)]
    assert all(structure.pool == 0 for structure in dropped)
    counted = [p.structure for p in plans("fitted bias")]
    assert not any(isinstance(s, Landmark) and s.fitted for s in counted)


def test_without_escalation_misses_are_reported(layer: Layer) -> None:
    rows = {row["part"]: row for row in ablate([layer], 0.1, target="sm90")}
    assert rows["escalation"]["escalated"] == 0
    assert rows[ablations.WHOLE]["within"] == 1.0
    assert rows["structure"]["share"] == 1.0
    assert rows[ablations.WHOLE]["share"] < 1.0
    for row in rows.values():
        assert 0 < row["speedup_whole"] <= row["speedup"] * (1 + 1e-9)


def test_the_whole_policy_is_the_default_one_unhurried() -> None:
    assert unhurried() == Without("")
    assert unhurried().name == "unhurried"
