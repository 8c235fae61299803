"""What the tests of the PyTorch adapter share: oracles and the rule for outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adaattn_torch.info import forget_warnings

# Unit roundoff of each format, and the largest error of an exact result rounded to it.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="gpu: PyTorch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_warnings():
    forget_warnings()


def oracle(query, key, value, mask=None, *, scale=None, is_causal=False, enable_gqa=False):
    """Attention by its formula, in the machine's longest float; and the size of its scores.

    Returns the output and the largest score that anybody sees.
    """
    query, key, value = (x.detach().double().cpu().numpy() for x in (query, key, value))
    query, key, value = (x.astype(np.longdouble) for x in (query, key, value))
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (np.repeat(x, group, axis=-3) for x in (key, value))
    scale = 1 / np.sqrt(np.longdouble(query.shape[-1])) if scale is None else scale
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = np.where(mask.cpu().numpy(), scores, -np.inf)
    elif mask is not None:
        scores = scores + mask.detach().double().cpu().numpy()
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    out = np.matmul(weights, value) / np.where(total == 0, 1, total)
    return out, float(np.abs(scores, where=np.isfinite(scores), out=0 * weights).max(initial=0))


def assert_as_good(ours, theirs, exact, value):
    """At most twice PyTorch's error, plus a floor: on tiny problems that error is 0 by luck.

    The floor is four roundings of the result, and four of each score in the format that scores
    are kept in (an error of a score is a relative error of its weight).
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    exact, largest_score = exact
    if not exact.size:
        return
    own, inner = ROUNDOFF[ours.dtype], min(ROUNDOFF[ours.dtype], 2.0**-24)
    floor = 4 * own * max(float(np.abs(exact).max()), 2.0**-14)
    floor += (
        4
        * inner
        * (1 + largest_score)
        * float(value.double().abs().max() if value.numel() else 0)
    )
    error, known = (
        np.abs(x.detach().double().cpu().numpy() - exact).max() for x in (ours, theirs)
    )
    assert math.isfinite(error)
    assert error <= 2 * known + floor
