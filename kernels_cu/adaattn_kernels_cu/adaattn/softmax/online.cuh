// online.cuh -- online softmax over accumulator fragments. SPDX-License-Identifier: Apache-2.0
//
// Keeps, for the two rows that a thread holds, a reference r and l = sum_j 2^(c s_j - c r), c =
// scale log2(e). Any r near the running maximum serves: it moves only when the maximum has grown by
// more than kSlackLog2, so probabilities stay below 2^kSlackLog2 and the accumulators are rescaled
// rarely. Source: Milakov & Gimelshein, arXiv 1805.02867; the slack is the conditional rescaling of
// FlashAttention-4, arXiv 2603.05451.
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/softmax/lse.cuh"
#include "adaattn/softmax/slack.cuh"

namespace adaattn::softmax {

ADAATTN_DEVICE float quad_max(float x) {
    x = fmaxf(x, ptx::shuffle_xor(x, 1));
    return fmaxf(x, ptx::shuffle_xor(x, 2));
}

ADAATTN_DEVICE float quad_sum(float x) {
    x += ptx::shuffle_xor(x, 1);
    return x + ptx::shuffle_xor(x, 2);
}

// Sums whole rows only at the end: until then `sum` is this thread's share of the columns.
struct Online {
    float reference[2];  // r, in units of the raw scores; -inf until the row has seen a key
    float sum[2];

    ADAATTN_DEVICE void reset() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            reference[r] = -ptx::infinity();
            sum[r] = 0.0f;
        }
    }

    // Turns scores into probabilities in place. Returns, alike in all lanes, whether the
    // accumulators must be multiplied by `factor`. With `fresh`, just after `reset`, there is
    // nothing to multiply, and `factor` keeps what the caller has in it. `slack` is kSlackLog2 /
    // scale_log2, divided on the host. No lane needs the row's maximum unless some lane of the warp
    // saw a score above the slack, so the common path has no shuffle.
    template <int kCount>
    ADAATTN_DEVICE bool exponentiate(float (&scores)[kCount], float scale_log2, float slack,
                                     bool fresh, float (&factor)[2]) {
        float highest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float even = fmaxf(scores[2 * r], scores[2 * r + 1]);
            float odd = fmaxf(scores[2 * r + 4], scores[2 * r + 5]);
#pragma unroll
            for (int i = 8; i < kCount; i += 8) {
                even = fmaxf(even, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
                odd = fmaxf(odd, fmaxf(scores[i + 2 * r + 4], scores[i + 2 * r + 5]));
            }
            highest[r] = fmaxf(even, odd);
        }
        const bool grown = highest[0] > reference[0] + slack || highest[1] > reference[1] + slack;
        const bool moved = ptx::warp_any(grown);
        if (moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float next = fmaxf(quad_max(highest[r]), reference[r]);
                // Equal references include -inf and -inf, whose difference would be NaN.
                const float rescale = next == reference[r]
                                          ? 1.0f
                                          : ptx::exp2_approx((reference[r] - next) * scale_log2);
                reference[r] = next;
                sum[r] *= rescale;
                if (!fresh) factor[r] = rescale;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // A row that has seen no key yet keeps every probability at 2^(-inf - 0) = 0.
            const float shift = reference[r] == -ptx::infinity() ? 0.0f : reference[r] * scale_log2;
            float even = 0.0f;
            float odd = 0.0f;
#pragma unroll
            for (int i = 0; i < kCount; i += 4) {
                float& first = scores[i + 2 * r];
                float& second = scores[i + 2 * r + 1];
                first = ptx::exp2_approx(fmaf(first, scale_log2, -shift));
                second = ptx::exp2_approx(fmaf(second, scale_log2, -shift));
                even += first;
                odd += second;
            }
            sum[r] += even + odd;
            // Added up here, under the products in flight, not where it is next needed.
            asm volatile("" : "+f"(sum[r]));
        }
        return moved;
    }

    // Whether one of the thread's two rows may hold a weight of at least 2^skip_log2 of all that it
    // has seen, the scores' own tile left out: scores at or below the running log-sum-exp plus
    // skip_log2 weigh at most that in the end, since the log-sum-exp only grows. Alike in a quad.
    template <int kCount>
    ADAATTN_DEVICE bool matters(const float (&scores)[kCount], float scale_log2,
                                float skip_log2) const {
        bool any = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float even = fmaxf(scores[2 * r], scores[2 * r + 1]);
            float odd = fmaxf(scores[2 * r + 4], scores[2 * r + 5]);
#pragma unroll
            for (int i = 8; i < kCount; i += 8) {
                even = fmaxf(even, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
                odd = fmaxf(odd, fmaxf(scores[i + 2 * r + 4], scores[i + 2 * r + 5]));
            }
            const float total = quad_sum(sum[r]);
            // A row that has seen nothing keeps every tile in which it sees a key.
            const float seen =
                total > 0.0f ? reference[r] * scale_log2 + __log2f(total) : -ptx::infinity();
            const float least = seen + skip_log2;
            any |= !(fmaxf(even, odd) * scale_log2 <= least);
        }
        return any;
    }

    // Natural-logarithm lse of row r, of which `row_sum` is the sum; -inf where that is 0.
    ADAATTN_DEVICE float lse(int r, float row_sum, float scale_log2) const {
        return natural_lse(reference[r], scale_log2, row_sum);
    }
};

template <int kCount>
ADAATTN_DEVICE void clear(float (&accumulators)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) accumulators[i] = 0.0f;
}

template <int kCount>
ADAATTN_DEVICE void rescale_rows(float (&accumulators)[kCount], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) accumulators[i] *= factor[(i / 2) % 2];
}

// Rounds a fragment of probabilities to 16 bits: the A operand of the next product, k16 slice by
// k16 slice.
template <Format kFormat, int kCount>
ADAATTN_DEVICE void round_pairs(const float (&probabilities)[kCount], u32 (&rounded)[kCount / 2]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i)
        rounded[i] = quant::pack_pair<kFormat>(probabilities[2 * i], probabilities[2 * i + 1]);
}

}  // namespace adaattn::softmax
