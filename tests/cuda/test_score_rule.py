"""Softcap and sinks in the sm80 kernel's own source, on a CPU, against float64 written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sm80_on_cpu import UNIT, Emulator, aligned, assert_close, problem

from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.jit.codegen import render
from adaattn_cuda.jit.spec import PLAIN, SINKS, SOFTCAP
from adaattn_cuda.tuning import sm80_attn_fwd as sm80
from adaattn_cuda.tuning import sm90_attn_fwd_f16 as sm90


def expected(
    p: AttentionProblem, softcap: float, sinks: NDArray[np.float32] | None, hidden: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """out and lse by the formula, in float64; `hidden` broadcasts to the scores."""
    q, k, v = (np.asarray(x, np.float64) for x in (p.query, p.key, p.value))
    k, v = (np.repeat(x, p.group_size, axis=1) for x in (k, v))
    scores = p.scale * (q @ k.swapaxes(2, 3))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if p.mask.bias is not None:
        scores = scores + np.asarray(p.mask.bias, np.float64)
    scores = np.where(hidden, -np.inf, scores)
    logits = scores
    if sinks is not None:
        column = np.broadcast_to(
            sinks.astype(np.float64)[None, :, None, None], (*q.shape[:3], 1)
        )
        logits = np.concatenate([scores, column], axis=3)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.maximum(logits.max(3), -1e300)
        lse = top + np.log(np.exp(logits - top[..., None]).sum(3))
        weights = np.where(np.isneginf(lse)[..., None], 0, np.exp(scores - lse[..., None]))
    return weights @ v, lse


RULES = {
    "softcap": (3.0, None),
    "sinks": (0.0, (-0.5, 2.0)),
    "both": (1.5, (0.3, -4.0)),
    "sinks above and below every score": (0.0, (90.0, -90.0)),
}


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", ["none", "causal", "additive"])
def test_rules(emulator: Emulator, dtype: str, name: str, masked: str) -> None:
    softcap, of_heads = RULES[name]
    sinks = None if of_heads is None else np.array(of_heads, np.float32)
    bias = np.linspace(-2, 2, 70, dtype=np.float32)[None, None, None]
    mask = {
        "none": None,
        "causal": Mask.causal("bottom_right"),
        "additive": Mask.additive(bias),
    }[masked]
    p = problem(dtype, (80, 70), heads=(2, 1), mask=mask)
    p.query[...] *= 4  # scores of about 4: the cap bites
    rows, keys = np.arange(80)[:, None], np.arange(70)
    hidden = keys > rows - 10 if masked == "causal" else np.zeros((1, 70), bool)
    out, lse, chosen = emulator.run(p, dtype, dtype, softcap=softcap, sinks=sinks)
    assert chosen.rule == (SOFTCAP if softcap else PLAIN) | (SINKS if of_heads else PLAIN)
    exact, exact_lse = expected(p, softcap, sinks, hidden)
    reached = np.isfinite(exact_lse)
    np.testing.assert_array_equal(np.isfinite(lse), reached)
    assert np.abs(lse[reached] - exact_lse[reached]).max() <= 2.0**-20 * 128
    for head in range(2):  # a head under a large sink is tiny: each by its own size
        # A logit's rounding is an error of that many units in whatever it is compared with.
        logit = 0.0 if of_heads is None else max(of_heads[head], 0.0) * 2.0**-23
        assert_close(out[:, head], exact[:, head], 3 * UNIT[dtype] + logit)


def test_a_sink_of_minus_infinity_is_none(emulator: Emulator) -> None:
    p = problem("bf16", (80, 70), heads=(2, 1), mask=Mask.causal("bottom_right"))
    none = np.full(2, -np.inf, np.float32)
    plain, lse, _ = emulator.run(p, "bf16", "bf16")
    out, with_none, _ = emulator.run(p, "bf16", "bf16", sinks=none)
    np.testing.assert_array_equal(lse, with_none)  # -inf where a row sees nothing, too
    assert_close(out, plain.astype(np.float64), UNIT["bf16"])


@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_a_sink_that_is_no_number_is_not_hidden(emulator: Emulator, sink: float) -> None:
    p = problem("bf16", (20, 70), heads=(2, 1))
    out, lse, _ = emulator.run(p, "bf16", "bf16", sinks=np.array([sink, 0], np.float32))
    assert np.isnan(out[0, 0]).all()
    assert np.isnan(lse[0, 0]).all()
    assert np.isfinite(out[0, 1]).all()


def test_nothing_leaks_from_hidden_keys(emulator: Emulator) -> None:
    p = problem("bf16", (50, 90), heads=(2, 1), mask=Mask.key_lengths([60]))
    clean, lse, _ = emulator.run(p, "bf16", "bf16", softcap=2.0, sinks=np.zeros(2, np.float32))
    p.value[:, :, 60:], p.key[:, :, 60:] = np.nan, np.inf
    out, other, _ = emulator.run(p, "bf16", "bf16", softcap=2.0, sinks=np.zeros(2, np.float32))
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(lse, other)


def test_infinite_scores_are_capped(emulator: Emulator) -> None:
    """The cap of an infinite score is the cap: what float64 says of a score that overflows."""
    q, k = (aligned(np.full((1, 1, 20, 32), x, np.float32)) for x in (1e20, 1e20))
    k[:, :, 10:] *= -1
    v = aligned(np.random.default_rng(0).standard_normal((1, 1, 20, 32)).astype(np.float32))
    p = AttentionProblem.from_arrays(q, k, v)
    out, _, _ = emulator.run(p, "f32", "f32", softcap=2.0)
    assert_close(out, expected(p, 2.0, None, False)[0], 4 * UNIT["f32"])


def test_a_rule_is_written_into_the_unit_and_nothing_else() -> None:
    tile = sm90.candidates(128, 128)[0][1]
    plain = render(tile.spec("bf16"))
    assert "Ruled" not in plain
    ((_, ruled), *_) = sm90.candidates(128, 128, SOFTCAP | SINKS)
    text = render(ruled.spec("bf16"))
    traits = plain.split("using Traits = ")[1].split(";")[0]
    assert f"adaattn::softmax::Ruled<{traits}, 3>" in text
    assert "RuledParams params" in text
    assert sm80.specialise("sm_80", "bf16", "bf16", "bf16", 64, 64, rule=2).rule == 2


def test_tiles_whose_tanh_would_spill_are_not_taken() -> None:
    assert {tile.consumers for _, tile in sm90.candidates(64, 64)} == {2, 3}
    assert {tile.consumers for _, tile in sm90.candidates(64, 64, SINKS)} == {2, 3}
    assert {tile.consumers for _, tile in sm90.candidates(64, 64, SOFTCAP)} == {2}
