// sm90_mask.cuh -- masks on wgmma accumulator fragments. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::mask {

// Whether some row of [row_first, row_last] misses a column of a tile of `columns` keys. The last
// row has the latest start and the first row the earliest stop. Without branches: it runs while
// products are in flight.
ADAATTN_DEVICE bool needed(const WorkItem& item, const Source& source, int position, int keys_left,
                           int columns, int row_first, int row_last) {
    const int start = visible(item, row_last).start - position;
    const int stop = visible(item, row_first).stop - position;
    return (keys_left < columns) |
           ((source.mask != work::kMaskNone) & ((start > 0) | (stop < columns)));
}

// Replaces scores outside the intervals of the thread's two rows, `row` and `row` + 8, by -inf; a
// wgmma accumulator fragment. A replaced score may be NaN: it is selected away, never multiplied.
// Most masks have no start: theirs is a pass of its own.
template <int kCount>
ADAATTN_DEVICE void apply(float (&scores)[kCount], const WorkItem& item, const Source& source,
                          int position, int keys_left, int row, int lane) {
    // Column of scores[0]; block j of eight columns holds column + 8 j + {0, 1}.
    const int column = 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Interval seen = visible_columns(item, source, position, keys_left, row + 8 * r);
        const int start = seen.start - column;
        const int stop = seen.stop - column;
#pragma unroll
        for (int i = 2 * r; i < kCount; i += 4) {
            if (2 * (i - 2 * r) >= stop) scores[i] = -ptx::infinity();
            if (2 * (i - 2 * r) + 1 >= stop) scores[i + 1] = -ptx::infinity();
        }
        if (seen.start > 0) {
#pragma unroll
            for (int i = 2 * r; i < kCount; i += 4) {
                if (2 * (i - 2 * r) < start) scores[i] = -ptx::infinity();
                if (2 * (i - 2 * r) + 1 < start) scores[i + 1] = -ptx::infinity();
            }
        }
    }
}

// The same where each of the thread's two rows sees the columns before a limit of its own.
template <int kCount>
ADAATTN_DEVICE void apply_stops(float (&scores)[kCount], int first_stop, int second_stop,
                                int lane) {
    const int column = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        if (2 * i + column >= first_stop) scores[i] = -ptx::infinity();
        if (2 * i + column + 1 >= first_stop) scores[i + 1] = -ptx::infinity();
        if (2 * i + column >= second_stop) scores[i + 2] = -ptx::infinity();
        if (2 * i + column + 1 >= second_stop) scores[i + 3] = -ptx::infinity();
    }
}

}  // namespace adaattn::mask
