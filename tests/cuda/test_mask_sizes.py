"""Magnitudes of additive masks, as facts of a device run report them."""

from __future__ import annotations

import numpy as np
import pytest

from adaattn_core import Mask
from adaattn_cuda.mask_sizes import MaskSizes

LOWEST = np.finfo(np.float32).min


def filled(lowest: float) -> np.ndarray:
    """Causal, with a row and some columns of nothing else, and a few ordinary entries."""
    rng = np.random.default_rng(0)
    bias = np.where(np.tril(np.ones((16, 16), bool)), rng.uniform(-5, 0, (16, 16)), lowest)
    bias[4] = lowest
    return bias[None, None].astype(np.float32)


@pytest.mark.parametrize("lowest", [LOWEST, -np.inf])
def test_filled_masks_add_what_their_other_entries_are(lowest):
    assert MaskSizes(Mask.additive(filled(lowest)), 0.1).largest(10.0, 10.0, 3.0) <= 5


@pytest.mark.parametrize(
    ("norms", "mask"),
    [
        (
            (1e4, 1e4, 1.0),
            Mask.none(),
        ),  # scores may be as large as the mask
        ((1.0, 1.0, np.inf), Mask.none()),
        ((np.nan, 1.0, 1.0), Mask.none()),
        ((1.0, 1.0, 1.0), Mask.causal()),  # the row's largest entry may be out of its sight
        ((1.0, 1.0, 1.0), Mask.key_lengths([3])),
        ((1.0, 1.0, 1.0), Mask.ragged([0, 8, 16], [0, 8, 16])),
        ((1.0, 1.0, 1.0), Mask.boolean(np.ones((1, 16), bool))),
    ],
)
def test_otherwise_every_finite_entry_counts(norms, mask):
    sizes = MaskSizes(mask & Mask.additive(filled(LOWEST)), 1.0)
    assert sizes.largest(*norms) == -float(LOWEST)


def test_a_row_whose_entries_float32_rounds_counts():
    bias = np.zeros((1, 1, 4, 4), np.float32)
    bias[..., 1, :] = -1e9
    assert MaskSizes(Mask.additive(bias), 1.0).largest(1.0, 1.0, 1.0) == 1e9


def test_no_mask_adds_nothing():
    assert MaskSizes(Mask.none(), 1.0).largest(1.0, 1.0, 1.0) == 0
    empty = Mask.additive(np.zeros((1, 1, 0, 4), np.float32))
    assert MaskSizes(empty, 1.0).largest(1.0, 1.0, 1.0) == 0
