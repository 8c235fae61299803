// lse.cuh -- a row's log-sum-exp, once its sum is known. SPDX-License-Identifier: Apache-2.0
//
// -inf says that a row saw no key, and nothing else does: a row whose every score overflowed to
// -inf has a sum of 0 as well, but its result is not known. It is NaN, which certificates carry.
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::softmax {

// The sum as the epilogues take it, `sees` being whether the row saw a key.
ADAATTN_DEVICE float known_sum(float sum, bool sees) {
    return sum == 0.0f && sees ? ptx::not_a_number() : sum;
}

// Natural logarithm of sum x 2^ref, ref = top x scale; -inf for a sum of 0. What is finite stays
// so: a mask of the lowest finite number has a reference below every number.
ADAATTN_DEVICE float natural_lse(float top, float scale, float sum) {
    const float lse = kLn2 * (ptx::mul_rn(top, scale) + ptx::log2_accurate(sum));
    const float kept = lse < -kLargestF32 ? -kLargestF32 : (lse > kLargestF32 ? kLargestF32 : lse);
    return sum == 0.0f ? -ptx::infinity() : kept;
}

}  // namespace adaattn::softmax
