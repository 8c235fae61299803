// row_state.cuh -- online softmax of one warp's scores, in base 2.
// SPDX-License-Identifier: Apache-2.0
//
// Per row: the score `top` that the exponentials are taken against, and the sum so far of
//   p_j = 2^(s_j * scale - ref),  ref = fl(top * scale).
// `top` follows the running maximum only when that has grown by more than kSlackLog2: until then
// p_j <= 2^kSlackLog2, which costs no accuracy in any format (they are floating point) and saves
// rescaling the output. The choice is made per row, so a row's result does not depend on its
// neighbours.
#pragma once

#include "adaattn/ptx/sm80.cuh"
#include "adaattn/softmax/lse.cuh"
#include "adaattn/softmax/slack.cuh"

namespace adaattn::softmax {

// Beyond this |ref| the rounding of the product fl(top * scale) is no longer small; scores are
// then shifted before they are scaled, so that 2^x cannot overflow.
constexpr float kLargeRef = 16777216.0f;  // 2^24

template <int kRowTiles>
struct RowState {
    float top[kRowTiles][2];
    float sum[kRowTiles][2];  // this lane's columns only, until `finish`

    ADAATTN_DEVICE void reset() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[m][half] = -ptx::infinity();
                sum[m][half] = 0.0f;
            }
        }
    }

    // Turns the scores of row tile `m` into weights in place. Returns whether any of its rows moved
    // its `top`; `alpha` is then the factor on what was summed before (1 for rows that did not).
    template <int kKeyTiles>
    ADAATTN_DEVICE bool update(int m, float (&scores)[kKeyTiles][4], float scale,
                               float (&alpha)[2]) {
        bool moved_any = false;
        bool large_any = false;
        float ref[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top_new = -ptx::infinity();
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n) {
                top_new = ptx::max_number(top_new, scores[n][2 * half]);
                top_new = ptx::max_number(top_new, scores[n][2 * half + 1]);
            }
            top_new = ptx::max_number(top_new, ptx::shuffle_xor(top_new, 1));
            top_new = ptx::max_number(top_new, ptx::shuffle_xor(top_new, 2));
            const float top_old = top[m][half];
            // -inf minus -inf is NaN, which compares false: a row without keys stays put.
            const bool moves = (top_new - top_old) * scale > kSlackLog2;
            top[m][half] = moves ? top_new : top_old;
            ref[half] = ptx::mul_rn(top[m][half], scale);
            // Nothing was summed yet where top_old is -inf; 1 keeps an Inf added on its own.
            alpha[half] = moves && top_old != -ptx::infinity()
                              ? ptx::exp2_approx(ptx::mul_rn(top_old - top[m][half], scale))
                              : 1.0f;
            sum[m][half] *= alpha[half];
            moved_any |= moves;
            large_any |= ref[half] > kLargeRef || ref[half] < -kLargeRef;
        }
        if (ptx::warp_any(large_any)) {
            shift_large(m, scores, ref);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float shift = ref[half] == -ptx::infinity() ? 0.0f : -ref[half];
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    scores[n][e] = ptx::exp2_approx(ptx::fma_rn(scores[n][e], scale, shift));
                    sum[m][half] += scores[n][e];
                }
            }
        }
        return ptx::warp_any(moved_any);
    }

    // Sums over the four lanes that share a row.
    ADAATTN_DEVICE void finish() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[m][half] += ptx::shuffle_xor(sum[m][half], 1);
                sum[m][half] += ptx::shuffle_xor(sum[m][half], 2);
            }
        }
    }

    // Natural-log LSE of a row after `finish`, of which `sum` is the sum; -inf where that is 0.
    ADAATTN_DEVICE float lse(int m, int half, float sum_of_row, float scale) const {
        return natural_lse(top[m][half], scale, sum_of_row);
    }

  private:
    // (s - top) * scale instead of s * scale - ref, for the rows that need it.
    template <int kKeyTiles>
    ADAATTN_DEVICE void shift_large(int m, float (&scores)[kKeyTiles][4], float (&ref)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // By `top`, which is finite where its product with the scale may not be.
            const bool finite = top[m][half] < ptx::infinity() && top[m][half] > -ptx::infinity();
            const bool large = finite && (ref[half] > kLargeRef || ref[half] < -kLargeRef);
            const float shift = large ? top[m][half] : 0.0f;
            ref[half] = large ? 0.0f : ref[half];
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    scores[n][e] -= shift;
                }
            }
        }
    }
};

}  // namespace adaattn::softmax
