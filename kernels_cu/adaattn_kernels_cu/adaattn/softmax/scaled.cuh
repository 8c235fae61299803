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

    // Turns raw scores, to which `origin` was added, into weights in place; as Online::exponentiate,
    // `slack` in units of log2.
    template <int kCount, int kSpans>
    ADAATTN_DEVICE bool exponentiate(float (&scores)[kCount], const Multipliers<kSpans>& multiplier,
                                     float origin, float slack, float weight_log2, bool fresh,
                                     float (&factor)[2]) {
        constexpr int kOfSpan = kCount / kSpans;
        float highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = -ptx::infinity();
#pragma unroll
            for (int span = 0; span < kSpans; ++span) {
                const int begin = span * kOfSpan + 2 * r;
                float even = fmaxf(scores[begin], scores[begin + 1]);
                float odd = fmaxf(scores[begin + 4], scores[begin + 5]);
#pragma unroll
                for (int i = begin + 8; i < (span + 1) * kOfSpan; i += 8) {
                    even = fmaxf(even, fmaxf(scores[i], scores[i + 1]));
                    odd = fmaxf(odd, fmaxf(scores[i + 4], scores[i + 5]));
                }
                highest[r] = fmaxf(highest[r], (fmaxf(even, odd) - origin) * multiplier[r][span]);
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
            asm volatile("" : "+f"(sum[r]));  // added up here, under the products in flight
        }
        return moved;
    }

    // Natural-logarithm lse of row r, of which `row_sum` is the sum; -inf where that is 0.
    ADAATTN_DEVICE float lse(int r, float row_sum, float weight_log2) const {
        return natural_lse(reference[r] - weight_log2, 1.0f, row_sum);
    }
};

}  // namespace adaattn::softmax
