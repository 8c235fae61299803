"""Theorem 7: rounding inside sums of products, for float32 code and for tensor cores."""

from __future__ import annotations

import math
from functools import lru_cache

from adaattn_core.bounds.rounding import add_up, div_up, mul_up, sub_down
from adaattn_core.bounds.softmax import weight_ratio_as_score_error
from adaattn_core.formats import get_format

F32_UNIT = 2.0**-24
F64_UNIT = 2.0**-53
EXP_ULPS = 4
"""Error of exp that an executor may make, in ulp (2 units of roundoff each); NumPy's float32
exp errs by up to 2.52."""
SCORE_ROUNDINGS = 7
"""Relative roundings of a score before exp sees it: the difference with the running maximum (2,
since both are at most the largest magnitude), an additive bias (2: its cast and the sum), the
change of base to exp2 (3)."""
FP8_BLOCK = 32
"""Products that one FP8 tensor-core step adds at once."""
FP8_FRACTION_BITS = 13
HALF_BLOCK = 16
"""Products that one 16-bit tensor-core step adds at once."""
HALF_EXTRA_BITS = 2
_REMEMBERED = 4096
"""Sums of the same length occur in every head of a problem."""


@lru_cache(maxsize=_REMEMBERED)
def gamma_nearest(operations: int, unit: float = F32_UNIT) -> float:
    """Upper bound of ``|prod (1 + d_i)^(+-1) - 1|`` over n factors with ``|d_i| <= unit``.

    Parameters
    ----------
    operations : int
        Number n of roundings on the longest path through the computation, >= 0.
    unit : float
        Unit roundoff: 2^-24 for float32, 2^-53 for float64.

    Returns
    -------
    float
        ``n u / (1 - n u)``, inf from ``n u = 1`` on.

    References
    ----------
    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1; this
    project, docs/math/07-accumulation.md, lemma 7.1.

    Examples
    --------
    >>> gamma_nearest(0), gamma_nearest(2**24)
    (0.0, inf)
    """
    total = mul_up(float(operations), unit)
    return float(div_up(total, sub_down(1.0, total)))


def gamma_toward_zero(operations: int, unit: float = F32_UNIT) -> float:
    """Upper bound as `gamma_nearest`, for rounding toward zero: 2 units per step."""
    return gamma_nearest(operations, 2.0 * unit)


@lru_cache(maxsize=_REMEMBERED)
def block_sum_error(products: int, block: int, fraction_bits: int) -> float:
    """Upper bound of a tensor core's sum of products, relative to the sum of their magnitudes.

    Model: `block` products and the running sum are aligned to the largest exponent, cut toward
    zero after `fraction_bits` bits, added exactly, and the sum is cut to `fraction_bits` again.

    Parameters
    ----------
    products : int
        Products added one block after another, >= 0.
    block : int
        Products per step.
    fraction_bits : int
        Bits kept after the leading one.

    Returns
    -------
    float
        ``(1 + e)^steps - 1`` bounded by ``n e / (1 - n e)`` with ``e = (block + 2)
        2^-fraction_bits``.

    References
    ----------
    This project, docs/math/07-accumulation.md, theorem 7 (3).
    """
    steps = math.ceil(products / block) if products else 0
    per_step = (min(block, products) + 2) * 2.0**-fraction_bits
    return gamma_nearest(steps, per_step)


@lru_cache(maxsize=_REMEMBERED)
def product_sum_error(products: int, format_name: str, flush: int | None = None) -> float:
    """Upper bound of the error of a sum of products, relative to the sum of their magnitudes.

    Parameters
    ----------
    products : int
        Length of the sum (with every further rounding of the same path counted as one more).
    format_name : str
        Format of the operands. f64: float64 arithmetic. Others: float32 sums in any order, and
        for tensor-core formats also the block model of the hardware, whichever is worse; i8 is
        exact in integers, and its float32 emulation is not worse than a float32 sum.
    flush : int, optional
        Products after which an 8-bit float partial sum is moved to a float32 accumulator;
        None: never.

    References
    ----------
    This project, docs/math/07-accumulation.md, theorem 7.
    """
    info = get_format(format_name)
    if format_name == "f64":
        return gamma_nearest(products, F64_UNIT)
    plain = gamma_nearest(products)
    if format_name in ("f32", "i8"):
        return plain
    if info.accumulator_bits == FP8_FRACTION_BITS:
        run = products if flush is None else min(products, flush)
        inner = block_sum_error(run, FP8_BLOCK, FP8_FRACTION_BITS)
        return float(add_up(inner, plain, mul_up(inner, plain)))
    tensor_core = block_sum_error(products, HALF_BLOCK, 23 + HALF_EXTRA_BITS)
    # The stored sum keeps 23 fraction bits: one more cut per step.
    steps = math.ceil(products / HALF_BLOCK)
    stored = gamma_toward_zero(steps)
    return max(plain, float(add_up(tensor_core, stored, mul_up(tensor_core, stored))))


@lru_cache(maxsize=_REMEMBERED)
def exp_score_error(steps: int, relative_error: float = 2.0 * EXP_ULPS * F32_UNIT) -> float:
    """Upper bound of the errors of `exp` in a streaming softmax, expressed as a score error.

    A key's weight is one exponential times one rescaling exponential per later step.

    Parameters
    ----------
    steps : int
        Steps that the keys of a row are processed in.
    relative_error : float
        Of one exponential, in [0, 1).

    References
    ----------
    This project, docs/math/07-accumulation.md, lemma 7.3.
    """
    return float(mul_up(float(steps + 1), weight_ratio_as_score_error(relative_error)))


def library_exp_error(unit: float = F32_UNIT) -> float:
    """Upper bound of the relative error of a library's `exp`: 4 ulp."""
    return 2.0 * EXP_ULPS * unit


def score_rounding(score_max_abs: float, unit: float = F32_UNIT) -> float:
    """Upper bound of the score error from rounding scores of at most this magnitude before exp.

    The differences with successive running maxima telescope, so their number does not enter.

    References
    ----------
    This project, docs/math/07-accumulation.md, lemma 7.2.
    """
    return float(mul_up(gamma_nearest(SCORE_ROUNDINGS, unit), score_max_abs))
