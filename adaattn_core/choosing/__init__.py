"""What sampled masses decide, once for all backends: key blocks, near and far fields, draws.

A backend measures masses with its own arrays; which keys follow from them is said here, so that
the same plan and seed mean the same keys everywhere, but for rounding.
"""

from adaattn_core.choosing.blocks import block_groups, choose_blocks
from adaattn_core.choosing.fields import (
    BASE_WEIGHT,
    BIAS_RANGE,
    LANDMARK_STEP,
    Fields,
    heaviest,
    landmark_count,
    probe_draws,
)

__all__ = [
    "BASE_WEIGHT",
    "BIAS_RANGE",
    "LANDMARK_STEP",
    "Fields",
    "block_groups",
    "choose_blocks",
    "heaviest",
    "landmark_count",
    "probe_draws",
]
