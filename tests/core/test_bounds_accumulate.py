"""Theorem 7: rounding in sums, simulated exactly and compared with its bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.bounds import (
    block_sum_error,
    exp_score_error,
    gamma_nearest,
    gamma_toward_zero,
    product_sum_error,
    score_rounding,
)
from adaattn_core.formats import round_to_format

seeds = st.integers(0, 2**32 - 1)


def toward_zero(x: float, fraction_bits: int, exponent: int | None = None) -> float:
    """Cut toward zero after `fraction_bits` bits below 2**exponent (its own if None)."""
    if x == 0:
        return 0.0
    if exponent is None:
        exponent = math.frexp(x)[1] - 1
    quantum = 2.0 ** (exponent - fraction_bits)
    return math.trunc(x / quantum) * quantum


def block_sum(products: np.ndarray, block: int, fraction_bits: int, stored_bits: int) -> float:
    """Tensor-core model: align to the largest exponent, cut, add exactly, cut the sum."""
    total = 0.0
    for first in range(0, len(products), block):
        addends = [total, *products[first : first + block].tolist()]
        top = max(abs(x) for x in addends)
        if top == 0:
            continue
        exponent = math.frexp(top)[1] - 1
        exact = math.fsum(toward_zero(x, fraction_bits, exponent) for x in addends)
        total = toward_zero(exact, stored_bits)
    return total


def operands(seed: int, size: int, spread: int, name: str) -> np.ndarray:
    """Products of wildly different magnitudes and signs, exact in float64."""
    rng = np.random.default_rng(seed)
    pair = rng.uniform(1, 2, (2, size)) * 2.0 ** rng.integers(-spread, 1, (2, size))
    x, y = round_to_format(pair * rng.choice([-1, 1], (2, size)), name).astype(np.float64)
    return x * y


@settings(deadline=None)
@given(seeds, st.integers(1, 200), st.integers(0, 12))
def test_float32_sums_in_any_order_stay_within_gamma(seed, size, spread):
    products = operands(seed, size, spread, "f32")
    rounded = products.astype(np.float32)
    order = np.random.default_rng(seed).permutation(size)
    total = np.float32(0)
    for term in rounded[order]:
        total = np.float32(total + term)
    exact, magnitude = sum(map(Fraction, products)), sum(map(Fraction, np.abs(products)))
    for computed in (total, rounded.sum(dtype=np.float32)):
        error = abs(Fraction(float(computed)) - exact)
        assert error <= Fraction(gamma_nearest(size)) * magnitude
        assert error <= Fraction(product_sum_error(size, "f32")) * magnitude


@settings(deadline=None)
@given(seeds, st.integers(1, 150), st.integers(0, 12))
def test_sums_rounded_toward_zero_stay_within_their_gamma(seed, size, spread):
    products = operands(seed, size, spread, "bf16")
    total = 0.0
    for term in products:
        total = toward_zero(total + term, 23)
    exact, magnitude = math.fsum(products), math.fsum(np.abs(products))
    assert abs(total - exact) <= gamma_toward_zero(size) * magnitude


def test_truncation_of_equal_terms_is_biased_and_bounded():
    terms = np.full(1024, 4 / 3)
    total = 0.0
    for term in terms:
        total = toward_zero(total + term, 14)
    lost = (math.fsum(terms) - total) / math.fsum(terms)
    bound = gamma_toward_zero(1024, 2.0**-15)
    assert lost <= bound
    # Rounding to nearest would cancel; truncation loses a constant share of its bound.
    assert lost > 0.1 * bound


@settings(deadline=None)
@given(seeds, st.integers(1, 300), st.integers(0, 8), st.sampled_from([32, 64, 128, None]))
def test_fp8_accumulation_stays_within_the_block_model(seed, size, spread, flush):
    products = operands(seed, size, spread, "e4m3")
    step = flush or size
    total = np.float32(0)
    for first in range(0, size, step):
        part = block_sum(products[first : first + step], 32, 13, 13)
        total = np.float32(total + np.float32(part))
    exact, magnitude = math.fsum(products), math.fsum(np.abs(products))
    assert abs(float(total) - exact) <= product_sum_error(size, "e4m3", flush) * magnitude


@settings(deadline=None)
@given(seeds, st.integers(1, 300), st.integers(0, 12), st.sampled_from(["bf16", "f16"]))
def test_16_bit_tensor_cores_stay_within_the_block_model(seed, size, spread, name):
    products = operands(seed, size, min(spread, 10), name)
    computed = block_sum(products, 16, 25, 23)
    exact, magnitude = math.fsum(products), math.fsum(np.abs(products))
    assert abs(computed - exact) <= product_sum_error(size, name) * magnitude


def test_the_block_bound_is_nearly_attained():
    # One large product and 31 that lose almost a whole quantum each.
    products = np.array([1.0] + [2.0**-13 * 0.999] * 31)
    lost = math.fsum(products) - block_sum(products, 32, 13, 13)
    bound = block_sum_error(32, 32, 13) * math.fsum(products)
    assert lost <= bound < 1.2 * lost


def test_flushing_more_often_never_loosens_and_formats_are_ordered():
    errors = [product_sum_error(4096, "e4m3", flush) for flush in (32, 64, 128, 512, None)]
    assert errors == sorted(errors)
    assert product_sum_error(512, "f64") < product_sum_error(512, "f32")
    assert product_sum_error(512, "f32") <= product_sum_error(512, "bf16")
    assert product_sum_error(512, "bf16") < product_sum_error(512, "e4m3", 64)
    assert product_sum_error(0, "e4m3") == 0


@pytest.mark.parametrize("operations", [1, 10, 8192])
def test_gamma_is_rounded_up(operations):
    total = Fraction(operations) / 2**24
    assert Fraction(gamma_nearest(operations)) >= total / (1 - total)
    assert gamma_nearest(operations) <= float(total / (1 - total)) * (1 + 1e-14)


@settings(deadline=None)
@given(seeds, st.integers(1, 60), st.floats(0.01, 30))
def test_a_streamed_weight_is_the_exact_weight_of_a_nearby_score(seed, chunks, spread):
    """One key's weight through many rising maxima, in float32 as an executor computes it."""
    rng = np.random.default_rng(seed)
    tops = np.sort(rng.uniform(-spread, spread, chunks)).astype(np.float32)
    score = np.float32(tops[0] - np.float32(rng.random()))
    weight = np.exp(score - tops[0])
    factors = np.exp(tops[:-1] - tops[1:])
    for factor in factors:
        weight = np.float32(weight * factor)
    exact = float(score) - float(tops[-1])
    if exact < -80:
        return
    reach = float(np.abs(np.append(tops, score)).max())
    bound = score_rounding(reach) + exp_score_error(chunks) + gamma_nearest(chunks)
    assert abs(math.log(float(weight)) - exact) <= bound
