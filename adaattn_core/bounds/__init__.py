"""Rigorous bounds: one theorem per function, float64, rounded outward.

Every function returns an **upper** bound unless its name ends in ``_lower`` or ``_estimate``.
The theorems, with proofs, are numbered in docs/math; the functions cite them.
"""

from adaattn_core.bounds.accumulate import (
    block_sum_error,
    exp_score_error,
    gamma_nearest,
    gamma_toward_zero,
    library_exp_error,
    product_sum_error,
    score_rounding,
)
from adaattn_core.bounds.compose import compose, relative_terms
from adaattn_core.bounds.lowrank import projected_score_error, residual_norm
from adaattn_core.bounds.mass import (
    dropped_mass_error,
    pooled_log_mass,
    pooled_log_mass_lower,
    skipped_mass,
)
from adaattn_core.bounds.norms import (
    largest_norm_upper,
    rms_estimate,
    rms_norm_estimate,
    rms_norm_lower,
    row_norms_estimate,
    row_norms_upper,
)
from adaattn_core.bounds.probabilistic import deviation_factor, stochastic_score_error
from adaattn_core.bounds.quantise import (
    WeightRounding,
    rounded_values_error,
    rounded_weights_error,
    score_error,
    storing_error,
    weight_rounding,
)
from adaattn_core.bounds.sampling import minimal_sample_size, order_statistic, sample_size
from adaattn_core.bounds.softmax import (
    output_error,
    total_variation,
    value_diameter,
    weight_ratio_as_score_error,
)

__all__ = [
    "WeightRounding",
    "block_sum_error",
    "compose",
    "deviation_factor",
    "dropped_mass_error",
    "exp_score_error",
    "gamma_nearest",
    "gamma_toward_zero",
    "largest_norm_upper",
    "library_exp_error",
    "minimal_sample_size",
    "order_statistic",
    "output_error",
    "pooled_log_mass",
    "pooled_log_mass_lower",
    "product_sum_error",
    "projected_score_error",
    "relative_terms",
    "residual_norm",
    "rms_estimate",
    "rms_norm_estimate",
    "rms_norm_lower",
    "rounded_values_error",
    "rounded_weights_error",
    "row_norms_estimate",
    "row_norms_upper",
    "sample_size",
    "score_error",
    "score_rounding",
    "skipped_mass",
    "stochastic_score_error",
    "storing_error",
    "total_variation",
    "value_diameter",
    "weight_ratio_as_score_error",
    "weight_rounding",
]
