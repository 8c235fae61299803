"""A backend that differentiates returns exact attention's gradients, to its format's error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.backend import Differentiates, Forwards
from adaattn_core.errors import UnsupportedError
from adaattn_core.formats import FORMATS, get_format
from adaattn_core.problem import AttentionProblem
from adaattn_core.scores import SINKS, SOFTCAP
from adaattn_core.testing.gradients import exact_gradients, naive_gradients
from adaattn_core.testing.kit import Kit
from adaattn_core.testing.oracles import row_norms

FLOOR_ULP = 8
"""Rounding steps, of the size that the terms of a gradient may have, granted besides 2x."""


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@given(data=st.data())
@settings(max_examples=25)
def test_within_twice_naive(kit: Kit, dtype: str, data: st.DataObject) -> None:
    """At most twice the naive same-format error, whatever shapes and masks; twice the same.

    With the output and lse of the backend's own exact forward, where it has one, and without:
    an approximated forward's must never be needed.
    """
    backend = kit.backend
    if not isinstance(backend, Differentiates):
        pytest.skip(f"backend {kit.name} does not differentiate")
    plan = kit.head(qk=dtype, pv=dtype)
    kit.require(qk=dtype, pv=dtype)
    spec = data.draw(kit.specs(plan, dtypes=(dtype,), values=("normal",)))
    _check(kit, dtype, data, spec.build(), spec.build(kit.home.send), spec.seed)


@pytest.mark.parametrize("rule", [SOFTCAP, SINKS])
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@given(data=st.data())
@settings(max_examples=15)
def test_score_rules_within_twice_naive(
    kit: Kit, dtype: str, rule: str, data: st.DataObject
) -> None:
    """The same under a softcap, or with sinks, whose own gradient is one more."""
    backend = kit.backend
    if not isinstance(backend, Differentiates) or rule not in dict(kit.capabilities.rules):
        pytest.skip(f"backend {kit.name} does not differentiate, or not with {rule}")
    plan = kit.head(qk=dtype, pv=dtype)
    kit.require(qk=dtype, pv=dtype)
    spec = data.draw(kit.specs(plan, dtypes=(dtype,), values=("normal",)))
    host, sent = spec.build(), spec.build(kit.home.send)
    if rule == SOFTCAP:
        softcap = data.draw(st.floats(0.25, 64.0))
        host, sent = (replace(x, softcap=softcap) for x in (host, sent))
    else:
        drawn = st.floats(-8, 8, width=32) | st.just(-math.inf)
        heads = host.heads_q
        column = data.draw(st.lists(drawn, min_size=heads, max_size=heads))
        sinks = np.array(column, np.float32)
        host, sent = replace(host, sinks=sinks), replace(sent, sinks=kit.home.send(sinks))
    _check(kit, dtype, data, host, sent, spec.seed)


def _check(
    kit: Kit,
    dtype: str,
    data: st.DataObject,
    host: AttentionProblem,
    sent: AttentionProblem,
    seed: int,
) -> None:
    """Compare a backend's gradients of `sent` with those of `host`, the same in host memory."""
    backend: Any = kit.backend
    rng = np.random.default_rng(seed)
    rows = (host.batch, host.heads_q, host.len_q)
    grad_out = rng.standard_normal((*rows, host.dim_v)).astype(FORMATS[dtype].dtype)
    grad_lse = rng.standard_normal(rows).astype(np.float32)
    rules = {"softcap": sent.softcap, "sinks": sent.sinks}
    rules = {name: rule for name, rule in rules.items() if rule is not None}
    given_too: dict[str, Any] = {
        **rules,
        "mask": sent.mask,
        "scale": sent.scale,
        "grad_lse": kit.home.send(grad_lse),
        "need_bias": sent.mask.bias is not None,
    }
    if data.draw(st.booleans(), label="with out and lse") and isinstance(backend, Forwards):
        out, lse = backend.forward(
            sent.query, sent.key, sent.value, mask=sent.mask, scale=sent.scale, **rules
        )
        given_too |= {"out": out, "lse": lse}
    try:
        found = backend.backward(
            sent.query, sent.key, sent.value, kit.home.send(grad_out), **given_too
        )
    except UnsupportedError as refusal:
        pytest.skip(f"refused: {refusal.got}")
    truth = exact_gradients(host, grad_out, grad_lse)
    usual = naive_gradients(host, grad_out, grad_lse, multiply=dtype)
    sizes = _term_sizes(host, grad_out, grad_lse)
    for name in ("query", "key", "value", "bias", "sinks"):
        exact = getattr(truth, name)
        if exact is None:
            assert getattr(found, name) is None
            continue
        got = kit.home.fetch(getattr(found, name)).astype(np.float64)
        assert got.shape == exact.shape
        error, known = (
            float(row_norms((x - exact).ravel())) for x in (got, getattr(usual, name))
        )
        floor = FLOOR_ULP * get_format(dtype).unit_roundoff * sizes[name]
        assert error <= 2 * known + floor, f"d_{name}: {error:.4g}, naive {known:.4g}"


def _term_sizes(host: AttentionProblem, grad_out: Any, grad_lse: Any) -> dict[str, float]:
    """How large the terms are that cancel in each gradient: a Frobenius norm."""

    def longest(x: Any) -> float:
        wide = np.where(np.isfinite(x), x, 0).astype(np.float64)
        return float(row_norms(wide).max(initial=0.0))

    q, k, v, g = (longest(x) for x in (host.query, host.key, host.value, grad_out))
    scores = 2 * g * v + longest(grad_lse[..., None])
    rows = math.sqrt(host.batch * host.heads_q * host.len_q)
    return {
        "query": rows * host.scale * scores * k,
        "key": rows * host.scale * scores * q,
        "value": rows * g,
        "bias": rows * scores,
        "sinks": rows * scores,
    }
