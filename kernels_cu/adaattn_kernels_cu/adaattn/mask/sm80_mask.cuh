// sm80_mask.cuh -- masks on the score fragments of mma.sync. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/mma/sm80_products.cuh"

namespace adaattn::mask {

// -inf for every score that the row does not see: chosen, not multiplied, so that a NaN in a key
// that is masked out is gone. With array masks the scores come back scaled, in natural units (where
// a mask of the lowest finite number stays finite), and bit 2 m + half of `saw` says whether the
// lane's row m, half saw a key.
template <class T>
ADAATTN_DEVICE void mask_scores(mma::Scores<T>& scores, const WorkItem& item,
                                const ArrayMask& arrays, float scale, u32& saw, int first_row,
                                int first_key) {
    const int lane = ptx::thread_index() & 31;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            const Interval seen = visible(item, row);
            // Relative to this lane's first key, so that every comparison is with a constant.
            const int lane_key = first_key + 2 * (lane & 3);
            const Interval here = {seen.start - lane_key, seen.stop - lane_key};
#pragma unroll
            for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[m][n][2 * half + e];
                    bool sees = here.holds(8 * n + e);
                    if constexpr (T::kArrayMask) {
                        const float added = sees && row < item.rows
                                                ? arrays.added(row, lane_key + 8 * n + e)
                                                : -ptx::infinity();
                        sees = added != -ptx::infinity();
                        saw |= static_cast<u32>(sees) << (2 * m + half);
                        score = ptx::fma_rn(score, scale, added);
                    }
                    score = sees ? score : -ptx::infinity();
                }
            }
        }
    }
}

}  // namespace adaattn::mask
