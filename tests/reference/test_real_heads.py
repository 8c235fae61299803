"""Reduced formats and skipping on real heads: the errors that the design was chosen by."""

from __future__ import annotations

from importlib.resources import files

import ml_dtypes
import numpy as np
import pytest

from adaattn_core import AttentionProblem, HeadPlan, Mask, Plan, ScoreSkip
from adaattn_core.testing.oracles import relative_frobenius, row_errors
from adaattn_reference.backend import NumpyBackend

BACKEND = NumpyBackend()
TOKENS = 2048

# Plan fields, then the 10th and 90th percentiles of the relative output error that 99 heads of
# the same model had at this length. The median of a few heads belongs between them.
BANDS = [
    ({"qk": "f32", "pv": "bf16"}, 0.0003, 0.0008),
    ({"qk": "e4m3", "pv": "f32", "scales": "block", "smooth_k": False}, 0.034, 0.122),
    ({"qk": "e4m3", "pv": "f32", "scales": "block"}, 0.031, 0.111),
    ({"qk": "e4m3", "pv": "f32", "scales": "token"}, 0.027, 0.104),
    ({"qk": "i8", "pv": "f32", "scales": "block"}, 0.010, 0.040),
    ({"qk": "i8", "pv": "f32", "scales": "token"}, 0.008, 0.033),
    ({"qk": "f32", "pv": "e4m3", "p_scale": 448.0}, 0.012, 0.025),
]


@pytest.fixture(scope="module")
def problems() -> list[AttentionProblem]:
    out = []
    for path in sorted(files("adaattn_core").joinpath("demo_data").iterdir(), key=str):
        if path.name.endswith(".npz"):
            with path.open("rb") as stream, np.load(stream) as file:
                q, k, v = (
                    file[n][None, :, :TOKENS].view(ml_dtypes.bfloat16).astype(np.float32)
                    for n in "qkv"
                )
                scale = float(file["scale"])
            out.append(AttentionProblem.from_arrays(q, k, v, mask=Mask.causal(), scale=scale))
    assert len(out) == 2
    return out


@pytest.fixture(scope="module")
def exact(problems):
    plan = HeadPlan(qk="f64", pv="f64")
    return [BACKEND.run(p, Plan.uniform(p, plan)).out for p in problems]


def errors(problems, exact, plan: HeadPlan) -> list[float]:
    found = []
    for problem, truth in zip(problems, exact, strict=True):
        out = BACKEND.run(problem, Plan.uniform(problem, plan)).out
        heads = range(problem.heads_q)
        found += [relative_frobenius(out[0, h], truth[0, h]) for h in heads]
    return found


@pytest.mark.parametrize(("fields", "low", "high"), BANDS)
def test_format_errors_lie_in_the_measured_bands(problems, exact, fields, low, high):
    assert low <= np.median(errors(problems, exact, HeadPlan(**fields))) <= high


def test_eight_bit_integers_beat_e4m3_for_scores(problems, exact):
    by_format = {
        name: errors(problems, exact, HeadPlan(qk=name, pv="f32")) for name in ("i8", "e4m3")
    }
    assert all(a < b for a, b in zip(by_format["i8"], by_format["e4m3"], strict=True))


@pytest.mark.parametrize("tile_kv", [1, 64])
@pytest.mark.parametrize("lam", [1e-2, 1e-4, 1e-6])
def test_skipped_keys_cost_no_more_than_their_bound(problems, exact, lam, tile_kv):
    for problem, truth in zip(problems, exact, strict=True):
        structure = ScoreSkip(lam=lam, tile_kv=tile_kv)
        raw = BACKEND.run(problem, Plan.uniform(problem, HeadPlan(structure=structure)))
        for (_, head), facts in raw.facts.items():
            dropped = min(facts.dropped_mass_upper, 1.0)
            worst = row_errors(raw.out[0, head], truth[0, head]).max()
            rounding = 1e-4 * facts.value_norm_upper
            assert worst <= dropped * facts.value_diameter_upper + rounding
            assert 0 < facts.share <= 1


def test_smaller_tiles_skip_more(problems):
    shares = {}
    for tile in (1, 64):
        plan = HeadPlan(structure=ScoreSkip(lam=1e-3, tile_kv=tile))
        raw = BACKEND.run(problems[0], Plan.uniform(problems[0], plan))
        shares[tile] = np.mean([f.share for f in raw.facts.values()])
    assert shares[1] < 0.8 * shares[64]
