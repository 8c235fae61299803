// scaled.cuh -- online softmax over score fragments whose columns and rows have scales of their
// own. SPDX-License-Identifier: Apache-2.0
//
// A thread holds two rows, and of every 64 columns those that share one scale: a score in units of
// log2 is raw x m, m one number for each row and 64 columns. The reference is kept in units of log2,
// since raw scores of two tiles do not compare. Weights come out multiplied by 2^weight_log2, the
// sum as well: whoever divides by the sum never sees the factor, the lse takes it off.
#pragma once

#include "adaattn/softmax/online.cuh"

namespace adaattn::softmax {

template <int kSpans>
using Multipliers = float[2][kSpans];

struct Scaled {
    float reference[2];  // log2 units; -inf until the row has seen a key
    float sum[2];        // this thread's columns only, until the end

    ADAATTN_DEVICE void reset() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            reference[r] = -ptx::infinity();
            sum[r] = 0.0f;
        }
    }

    // The largest of a row's scores among `count` from `begin` on. Above an origin all are of one
    // sign and exponent, or -inf, and so in order as integers: of three of those at once.
    template <bool kOrdered, int kCount>
    ADAATTN_DEVICE static float largest(const float (&scores)[kCount], int begin, int count) {
        const auto most = [](float a, float b) {
            if constexpr (kOrdered) {
                return __int_as_float(larger(__float_as_int(a), __float_as_int(b)));
            } else {
                return fmaxf(a, b);
            }
        };
        float even = most(scores[begin], scores[begin + 1]);
        float odd = most(scores[begin + 4], scores[begin + 5]);
#pragma unroll
        for (int i = 8; i < count - count % 8; i += 8) {
            even = most(most(even, scores[begin + i]), scores[begin + i + 1]);
            odd = most(most(odd, scores[begin + i + 4]), scores[begin + i + 5]);
        }
        return most(even, odd);
    }

    // Moves the reference to raw scores, to which `origin` was added; as Online::exponentiate,
    // `slack` in units of log2.
    template <int kCount, int kSpans>
    ADAATTN_DEVICE bool advance(const float (&scores)[kCount],
                                const Multipliers<kSpans>& multiplier, float origin, float slack,
                                bool fresh, float (&factor)[2]) {
        constexpr int kOfSpan = kCount / kSpans;
        float highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = -ptx::infinity();
#pragma unroll
            for (int span = 0; span < kSpans; ++span) {
                const int begin = span * kOfSpan + 2 * r;
                const float most = origin == 0.0f ? largest<false>(scores, begin, kOfSpan)
                                                  : largest<true>(scores, begin, kOfSpan);
                highest[r] = fmaxf(highest[r], (most - origin) * multiplier[r][span]);
            }
        }
        const bool grown = highest[0] > reference[0] + slack || highest[1] > reference[1] + slack;
        const bool moved = ptx::warp_any(grown);
        if (moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float next = fmaxf(quad_max(highest[r]), reference[r]);
                const float rescale =
                    next == reference[r] ? 1.0f : ptx::exp2_approx(reference[r] - next);
                reference[r] = next;
                sum[r] *= rescale;
                if (!fresh) factor[r] = rescale;
            }
        }
        return moved;
    }

    // Turns the same scores into weights in place.
    template <int kCount, int kSpans>
    ADAATTN_DEVICE void weigh(float (&scores)[kCount], const Multipliers<kSpans>& multiplier,
                              float origin, float weight_log2) {
        constexpr int kOfSpan = kCount / kSpans;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float shift =
                reference[r] == -ptx::infinity() ? 0.0f : reference[r] - weight_log2;
            float even = 0.0f;
            float odd = 0.0f;
#pragma unroll
            for (int span = 0; span < kSpans; ++span) {
                const float m = multiplier[r][span];
                const float below = -fmaf(origin, m, shift);
#pragma unroll
                for (int i = span * kOfSpan + 2 * r; i < (span + 1) * kOfSpan; i += 4) {
                    scores[i] = ptx::exp2_approx(fmaf(scores[i], m, below));
                    scores[i + 1] = ptx::exp2_approx(fmaf(scores[i + 1], m, below));
                    even += scores[i];
                    odd += scores[i + 1];
                }
            }
            sum[r] += even + odd;
        }
    }

    // Natural-logarithm lse of row r, of which `row_sum` is the sum; -inf where that is 0.
    ADAATTN_DEVICE float lse(int r, float row_sum, float weight_log2) const {
        return natural_lse(reference[r] - weight_log2, 1.0f, row_sum);
    }
};

}  // namespace adaattn::softmax
