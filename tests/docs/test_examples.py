"""Every example runs as a reader would run it, and is shown on the page of examples."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "tutorial" / "examples.md"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
EXTRA = {"jax_arrays": "jax", "transformers_model": "transformers"}
"""Libraries that an example shows and AdaAttn does not depend on."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_runs_without_a_warning(script: Path, tmp_path: Path) -> None:
    needed = EXTRA.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: no dependency of AdaAttn or of its tests")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_is_one_for_every_way_in() -> None:
    stems = {script.stem for script in SCRIPTS}
    assert {"numpy_only", "transformers_model", "own_policy", "jax_arrays"} <= stems


def test_every_example_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = [entry.name for entry in EXAMPLES.iterdir() if not entry.name.startswith("_")]
    assert [entry for entry in shown if entry not in text] == []
