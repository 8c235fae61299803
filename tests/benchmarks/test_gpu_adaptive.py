"""What gpu_adaptive.py reports must be right before it is measured: truth, errors, rotation."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from adaattn_bench.truth import Truth
from adaattn_core.testing.oracles import relative_frobenius, row_quantile

torch = pytest.importorskip("torch")
ROUNDOFF = float(np.finfo(np.float64).eps) / 2
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if _lies_in(m, FOLDER)]:
        del sys.modules[name]


def _lies_in(module, folder):
    file = getattr(module, "__file__", None)
    return bool(file) and Path(file).parent == folder


def problem(module, length=96, dim=16):
    draw = torch.Generator().manual_seed(3)
    shapes = ((1, 6, length, dim), (1, 2, length, dim), (1, 2, length, dim))
    arrays = (torch.randn(s, generator=draw).to(torch.bfloat16) for s in shapes)
    return module("adaptive_peers").Heads(*arrays)


def test_exact_rows_are_causal_attention(module, monkeypatch):
    heads = problem(module)
    truth = module("adaattn_bench.truth")
    monkeypatch.setattr(truth, "CELLS_MAX", 5 * heads.length)  # several pieces
    rows = np.array([0, 1, 5, 17, 64, 70, 95])
    q, k, v = (x.double() for x in (heads.q, heads.k, heads.v))
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k, v, is_causal=True, enable_gqa=True).numpy()
    got = truth.exact_rows(heads.given, rows)
    # Both are off by float64's rounding alone. A score is a sum of `dim` products, scaled; its
    # error enters numerator and denominator; each of these sums up to `length` terms; and a
    # few roundings of exp, the shift and the quotient remain. The unit is the largest value.
    dim = q.shape[3]
    wide = k.repeat_interleave(heads.count // k.shape[1], dim=1)
    score = float((q.abs() @ wide.abs().mT).max()) / math.sqrt(dim)
    relative = 2 * (dim + 3) * score + 2 * heads.length + 8
    limit = 2 * relative * ROUNDOFF * float(v.abs().max())
    assert limit <= 1e-12
    assert np.abs(got - expected[:, :, rows]).max() <= limit


def test_errors_are_those_of_the_oracles(module):
    heads = problem(module)
    exact = Truth.draw(heads.given, heads.length, seed=0)
    assert len(exact.rows) == heads.length
    out = exact.out + 0.1 * np.random.default_rng(4).standard_normal(exact.out.shape)
    errors = exact.errors(torch.from_numpy(out))
    for head in range(heads.count):
        pair = out[0, head], exact.out[0, head]
        # Roots of sums of squares over roots of sums of squares, in another order on each side.
        rel = 2 * (pair[0].size + 8) * ROUNDOFF
        assert rel <= 1e-12
        assert errors["rows"][head] == pytest.approx(row_quantile(*pair, 0.95), rel=rel)
        assert errors["worst"][head] == pytest.approx(row_quantile(*pair, 1.0), rel=rel)
        assert errors["frobenius"][head] == pytest.approx(relative_frobenius(*pair), rel=rel)


def test_a_nonfinite_or_zero_output_is_no_small_error(module):
    heads = problem(module)
    exact = Truth.draw(heads.given, heads.length, seed=0)
    broken = torch.from_numpy(exact.out.copy())
    broken[0, 0] = math.nan
    broken[0, 1] = 0.0
    errors = exact.errors(broken)["rows"]
    assert errors[0] == errors[1] == math.inf
    assert errors[2] == 0.0


@pytest.mark.parametrize("stretch", [4.0, 16.0])
def test_rotation_is_that_of_transformers(module, stretch):
    transformers = pytest.importorskip("transformers")
    rope = importlib.import_module("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=576,
        num_attention_heads=9,
        max_position_embeddings=int(8192 * stretch),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": stretch,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    got, got_factor = module("smollm2_torch").inverse_frequencies(64, 1e5, 8192, stretch)
    # base ** x in float32: rounding x is magnified by ln(base); then some four roundings more.
    limit = (math.log(1e5) + 4) * 2.0**-24
    assert limit <= 1e-6
    assert float(((got - expected) / expected).abs().max()) <= limit
    assert got_factor == pytest.approx(factor)


def test_a_problem_is_measured_and_reported(module):
    heads = problem(module)
    measuring, report = module("adaptive_measure"), module("adaptive_report")
    exact = Truth.draw(heads.given, heads.length, seed=0)
    settings = measuring.Settings(
        budgets=(0.2,), peers=("cuDNN", "dense", "FA3"), rounds=1, burst_ms=0.0, whole_repeats=1
    )
    cell = measuring.measure(heads, exact, settings) | {"text": "prose", "layers": [1]}
    facts = cell["contenders"]["budget 0.2"]["facts"]
    assert len(facts["upper"]) == len(facts["share"]) == heads.count
    assert np.less_equal(cell["contenders"]["cuDNN"]["errors"]["rows"], 0.02).all()
    assert "missing" not in cell["contenders"]["budget 0.2"]
    assert set(cell["contenders"]) == {"cuDNN", "dense", "budget 0.2"}
    assert set(cell["absent"]) <= {"FA3"}
    whole = {
        "device": "a CPU", "torch": torch.__version__, "date": "today", "command": "python",
        "revision": "none", "rounds": 1, "burst_ms": 0.0, "rows": 96, "budgets": [0.2],
        "captures": [{"text": "prose", "len": 96, "perplexity": 9.0}], "cells": [cell],
        "hard": [cell | {"case": "N(0, 1)"}], "needles": [], "graphs": [], "cut_short": ["x"],
    }  # fmt: skip
    page = report.markdown(whole)
    assert "| 0.2 | 96 | prose | 6 |" in page
    assert "- not begun: x" in page
    assert report.summary(whole)


def test_runs_are_joined_only_where_they_are_parts_of_one(module):
    joined = module("gpu_adaptive").joined
    first = {"revision": "a", "device": "H", "budgets": [0.1], "cells": [1], "hard": []}
    second = {"revision": "a", "device": "H", "budgets": [0.1], "cells": [2], "hard": [3]}
    whole = joined([dict(first), dict(second)])
    assert (whole["cells"], whole["hard"], whole["budgets"]) == ([1, 2], [3], [0.1])
    with pytest.raises(SystemExit, match="revision"):
        joined([dict(first), second | {"revision": "b"}])


def test_peers_of_an_earlier_run_keep_their_ratio_to_cudnn(module):
    def cell(cudnn, **others):
        times = {"cuDNN": cudnn} | others
        contenders = {n: {"ms": {"median": t}, "errors": {}} for n, t in times.items()}
        return {
            "text": "a", "len": 8, "layers": [1], "contenders": contenders,
            "absent": {"FA3": "missing"},
        }  # fmt: skip

    now = {"cells": [cell(4.0, **{"budget 0.1": 1.0})]}
    then = {"cells": [cell(2.0, FA3=3.0, **{"budget 0.1": 9.0})]}
    then |= {"revision": "r", "date": "d"}
    module("gpu_adaptive").carry_peers(now, then)
    (found,) = now["cells"]
    assert found["contenders"]["FA3"]["ms"]["median"] == 6.0
    assert found["contenders"]["budget 0.1"]["ms"]["median"] == 1.0
    assert found["absent"] == {}
    assert now["carried"] == {"FA3": "r, d"}


def test_what_a_run_left_out_comes_from_an_earlier_one_and_is_named(module):
    def cell(length, mark):
        return {"text": "prose", "len": length, "layers": [1], "mark": mark}

    older = {
        "revision": "abc", "captures": [{"text": "prose", "len": 8192}],
        "cells": [cell(8192, "old"), cell(32_768, "old")], "hard": [{"case": "x"}],
        "needles": [],
    }  # fmt: skip
    report = {
        "revision": "def", "captures": [], "cells": [cell(32_768, "new")], "hard": [],
        "needles": [],
    }  # fmt: skip
    module("gpu_adaptive").complete(report, older)
    assert [(c["len"], c["mark"]) for c in report["cells"]] == [(8192, "old"), (32_768, "new")]
    assert report["hard"] == older["hard"]
    assert report["remarks"] == ["Of an earlier revision, abc: 8k tokens, hard inputs."]
