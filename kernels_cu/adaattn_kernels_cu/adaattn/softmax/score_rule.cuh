// score_rule.cuh -- what some models do to scores besides scaling them: a softcap, and sinks.
// SPDX-License-Identifier: Apache-2.0
//
//   softcap   s <- cap tanh(scale s / cap), before any mask. Scores become y = tanh(rate s), rate =
//             scale / cap, and whatever scales scores from here on scales by cap instead.
//   sink      one more logit in a row's denominator, of no key and no value: out = acc / (sum +
//             e^sink), and lse counts it. It is added when the sum is finished, whatever its size.
// A rule is a trait of a kernel (Ruled below); without one nothing here leaves a trace in its code.
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/softmax/lse.cuh"

namespace adaattn::softmax {

enum ScoreRule : int { kPlain = 0, kSoftcap = 1, kSinks = 2 };  // bits of a set

// A kernel's traits with a rule, the host's way to ask for one.
template <class T, int kRuleT>
struct Ruled : T {
    static constexpr int kRule = kRuleT;
};

// The rule of a kernel's traits; plain Traits name none. To be called with 0.
template <class T>
__host__ __device__ constexpr auto rule_of(int) -> decltype(T::kRule) {
    return T::kRule;
}
template <class T>
__host__ __device__ constexpr int rule_of(long) {
    return kPlain;
}

// Absolute error 2^-21, which the cap multiplies: two approximate instructions. +-Inf gives +-1.
ADAATTN_DEVICE float tanh_approx(float x) {
    const float e = ptx::exp2_approx(x * (2.0f * kLog2E));
    return ptx::fma_rn(-2.0f, ptx::reciprocal_approx(1.0f + e), 1.0f);
}

// y = tanh(rate s) of one score. Scores of 16-bit operands do with the approximation.
template <bool kNarrow>
ADAATTN_DEVICE float capped(float score, float rate) {
    const float x = ptx::mul_rn(score, rate);
    return kNarrow ? tanh_approx(x) : ptx::tanh_accurate(x);
}

// The same of a fragment, in place.
template <int kRule, int kCount>
ADAATTN_DEVICE void cap_scores(float (&scores)[kCount], float rate) {
    if constexpr ((kRule & kSoftcap) != 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) scores[i] = capped<true>(scores[i], rate);
    }
}

// A row's log-sum-exp, and what its accumulated values are multiplied by.
struct Finished {
    float inverse;
    float lse;
};

// A row of which `sum` x 2^(top scale) is the sum over keys, with e^sink beside it. A sink of -inf
// is none; one that is +inf or NaN leaves nothing known.
ADAATTN_DEVICE Finished finish_with_sink(float top, float scale, float sum, float sink) {
    if (!(sink < ptx::infinity())) sum = ptx::not_a_number();
    float reference = top;
    float unit = scale;
    float share = 1.0f;  // what the keys' sum is multiplied by
    if (sink != -ptx::infinity()) {
        const float sink_log2 = ptx::mul_rn(sink, kLog2E);
        const float above = sink_log2 - ptx::mul_rn(top, scale);  // +inf where no key was seen
        if (above > 0.0f) {
            reference = sink_log2;
            unit = 1.0f;
            share = ptx::exp2_approx(-above);
            sum = sum * share + 1.0f;
        } else {
            sum += ptx::exp2_approx(above);
        }
    }
    const float inverse = sum == 0.0f ? 0.0f : share * ptx::reciprocal_approx(sum);
    return {inverse, natural_lse(reference, unit, sum)};
}

}  // namespace adaattn::softmax
