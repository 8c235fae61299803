"""Figures are drawn by a command from data that lie here, are small, and are shown."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
LARGEST_BYTES = 150_000
LARGEST_REPORT_BYTES = 300_000
"""Of a benchmark's report, which has many panels."""
PICTURES = sorted(
    p for kind in ("png", "svg") for p in DOCS.rglob(f"*.{kind}") if "_build" not in p.parts
)
PAGES = [ROOT / "README.md", *(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]


def script(name: str) -> ModuleType:
    """A module of docs/figures, which is a folder of scripts and no package."""
    if str(FIGURES) not in sys.path:
        sys.path.insert(0, str(FIGURES))
    return importlib.import_module(name)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_picture_is_small_and_shown(picture: Path) -> None:
    report = picture.parent.name == "benchmarks"
    assert picture.stat().st_size <= (LARGEST_REPORT_BYTES if report else LARGEST_BYTES)
    shown = [page for page in PAGES if picture.name in page.read_text(encoding="utf-8")]
    assert shown


def test_the_command_draws_every_picture_of_its_folder() -> None:
    drawn = set(script("draw").FIGURES)
    assert drawn == {p.stem for p in PICTURES if p.parent == FIGURES}
    assert script("draw").main(["no_such_figure"]) == 2


@pytest.mark.parametrize("name", ["architecture", "call", "pipeline"])
def test_drawings_are_what_the_command_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script("svg"), "FOLDER", tmp_path)
    drawn = script("draw").FIGURES[name]()
    assert drawn.read_text(encoding="utf-8") == (FIGURES / drawn.name).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", ["speed_error", "ablations"])
def test_picture_was_drawn_from_the_report_that_lies_here(name: str) -> None:
    """If not: python docs/figures/draw.py speed_error ablations tables."""
    style, module = script("style"), script(name)
    with Image.open(FIGURES / f"{name}.png") as picture:
        assert picture.info[style.SOURCE] == style.digest(module.REPORT)


def test_speed_picture_says_what_the_table_says() -> None:
    report = json.loads((DOCS / "benchmarks" / "gpu_adaptive.json").read_text(encoding="utf-8"))
    text = (DOCS / "benchmarks" / "gpu_adaptive.md").read_text(encoding="utf-8")
    table = text.split("## Peers", 1)[1].split("\n## ", 1)[0]
    heads = max(cell["heads"] for cell in report["cells"])
    for length in {cell["len"] for cell in report["cells"]}:
        for name, point in script("speed_error").points(report, length).items():
            row = f"| {length // 1024}k | {heads} | {name} |"
            (line,) = (x for x in table.splitlines() if x.startswith(row))
            speed = float(line.split("|")[5])
            assert point.speed == pytest.approx(speed, abs=0.0051)


def test_numbers_in_running_text_are_those_of_the_report() -> None:
    """If not: python docs/figures/draw.py tables speed_error."""
    tables = script("running_text")
    report, filled = tables.read(), 0
    for name in tables.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert tables.filled(text, report) == text, name
        filled += bool(tables.BLOCK.search(text))
    assert filled == len(tables.PAGES)
    others = [page for page in PAGES if "<!-- figures:" in page.read_text(encoding="utf-8")]
    assert {str(page.relative_to(ROOT)) for page in others} == set(tables.PAGES)


LENGTH = 768


@pytest.mark.parametrize("name", ["dense", "score_skip", "block_sparse", "landmark"])
def test_map_of_a_structure_counts_what_the_run_reports(name: str) -> None:
    """The colours are found from outside; the share is what the executor counted."""
    structures, heads = script("structures"), script("heads")
    one = heads.head(9, 2, LENGTH)
    found = structures.picture(one, structures.SHOWN[name])
    visible = found.kind != structures.UNSEEN
    computed = (found.kind == structures.COMPUTED)[visible].mean()
    if name == "landmark":  # a pooled column is one score for up to 64 keys
        assert 0 <= found.share - computed <= 1 / 32
        assert (found.kind == structures.APPROXIMATED).any()
    else:
        assert computed == pytest.approx(found.share, abs=2e-3)
    left_out = (found.kind == structures.LEFT_OUT).any()
    assert left_out == (name == "block_sparse")


def test_low_rank_computes_no_score_exactly() -> None:
    structures, heads = script("structures"), script("heads")
    structure = structures.LowRank(rank=32)
    kind = structures.picture(heads.head(9, 2, 256), structure).kind
    assert (kind[np.tril_indices(256, -64)] == structures.APPROXIMATED).mean() > 0.98


def test_certificate_picture_shows_the_rows_that_certified() -> None:
    certificate, heads = script("certificate"), script("heads")
    result, sample, every = certificate.certified(heads.head(16, 1))
    unit, upper = result.facts[0, 0].output_rms, result.certificate[0, 0].upper
    drawn = sample.error / unit
    assert len(every) == 8192
    assert 0 < (drawn > upper).sum() < 10
    # The certificate is one of the drawn errors, and the error of computing that one.
    above = upper - drawn[drawn <= upper].max()
    assert 0 <= above <= (1 + 1e-6) * sample.oracle_upper / unit + 1e-9
    assert np.isclose(drawn[:, None], every, rtol=1e-3, atol=1e-5).any(axis=1).all()


def test_far_field_cuts_nothing_at_full_rank() -> None:
    far, heads = script("far_field"), script("heads")
    one = heads.head(9, 0, 512)
    late = far.LateRows.of(one, 64)
    _, (none, all_columns) = far.cut_columns(late, 128, (0, 64))
    assert all_columns == pytest.approx(0, abs=1e-9)
    assert none > 0
    cut, whole = far.cut_features(one, late, (32, 64))
    assert whole == pytest.approx(0, abs=1e-9)
    assert cut > 0


def test_what_the_pages_say_of_one_setting_is_so() -> None:
    """README, index and why.md: errors that differ by ten, and a budget that is kept."""
    one, heads = script("one_setting"), script("heads").all_heads()
    fixed = next(policy for name, policy in one.CHOICES.items() if "landmarks" in name)
    errors = [one.outcome(head, fixed).true_rows for head in heads]
    assert max(errors) / min(errors) > 8
    assert f"{round(100 * max(errors))}%" in (ROOT / "README.md").read_text(encoding="utf-8")
    kept = [one.outcome(head, None) for head in (heads[0], heads[4])]
    assert all(row.certificate.upper <= one.BUDGET for row in kept)
    assert all(row.true_rows <= row.certificate.upper for row in kept)
