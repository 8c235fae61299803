"""What the tests of the PyTorch adapter share: oracles and the rule for outputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from adaattn_torch.info import forget_warnings

# Unit roundoff of each format, and the largest error of an exact result rounded to it.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@pytest.fixture(autouse=True)
def _fresh_warnings():
    forget_warnings()


def oracle(query, key, value, mask=None, **options):
    """PyTorch's own attention of the same numbers in float64, by its plain formula."""
    wide = [x.detach().double() for x in (query, key, value)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*wide, mask, **options)


def assert_as_good(ours, theirs, exact):
    """At most twice PyTorch's error, plus a floor of a few roundings of the largest value.

    The floor is there because PyTorch's error may be 0 by luck on tiny problems; four roundings
    are what an exact result may differ by after two sums in the format.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if not exact.numel():
        return
    floor = 4 * ROUNDOFF[ours.dtype] * max(float(exact.abs().max()), 2.0**-14)
    error = float((ours.double() - exact).abs().max())
    known = float((theirs.double() - exact).abs().max())
    assert math.isfinite(error)
    assert error <= 2 * known + floor
