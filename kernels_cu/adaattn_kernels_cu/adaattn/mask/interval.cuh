// interval.cuh -- masks as one interval of visible columns per query row. SPDX-License-Identifier: Apache-2.0
//
// Causal (both alignments), sliding windows, key lengths and ragged batches all let row r of a tile see the positions
// [max(key_start, start_offset + r), min(key_stop, stop_offset + r)): a work item carries those four numbers.
#pragma once

#include "adaattn/attn/work_item.cuh"

namespace adaattn::mask {

// Columns of a key tile that a row sees: first <= column < stop.
struct Interval {
    int first;
    int stop;
};

__device__ __forceinline__ Interval visible(const WorkItem& item, const Source& source, int position, int keys_left, int row) {
    if (!source.masked) return {0, keys_left};
    const int first = larger(item.key_start, item.start_offset + row) - position;
    const int stop = smaller(item.key_stop, item.stop_offset + row) - position;
    return {first, smaller(stop, keys_left)};
}

// Whether some row of [row_first, row_last] misses a column of a tile of `columns` keys. Limits move one way with the row, so
// the last row has the latest start and the first row the earliest stop. Without branches: it runs while products are in flight.
__device__ __forceinline__ bool needed(const WorkItem& item, const Source& source, int position, int keys_left, int columns,
                                       int row_first, int row_last) {
    const int start = larger(item.key_start, item.start_offset + row_last) - position;
    const int stop = smaller(item.key_stop, item.stop_offset + row_first) - position;
    return (keys_left < columns) | ((source.masked != 0) & ((start > 0) | (stop < columns)));
}

// Replaces scores outside the intervals of the thread's two rows, `row` and `row` + 8, by -inf. A replaced score may be NaN: it is
// selected away, never multiplied. Most masks have no start: theirs is a pass of its own.
template <int kCount>
__device__ __forceinline__ void apply(float (&scores)[kCount], const WorkItem& item, const Source& source, int position,
                                      int keys_left, int row, int lane) {
    const int column = 2 * (lane % 4);  // of scores[0]; block j of eight columns holds column + 8 j + {0, 1}
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Interval seen = visible(item, source, position, keys_left, row + 8 * r);
        const int first = seen.first - column;
        const int stop = seen.stop - column;
#pragma unroll
        for (int i = 2 * r; i < kCount; i += 4) {
            if (2 * (i - 2 * r) >= stop) scores[i] = negative_infinity();
            if (2 * (i - 2 * r) + 1 >= stop) scores[i + 1] = negative_infinity();
        }
        if (seen.first > 0) {
#pragma unroll
            for (int i = 2 * r; i < kCount; i += 4) {
                if (2 * (i - 2 * r) < first) scores[i] = negative_infinity();
                if (2 * (i - 2 * r) + 1 < first) scores[i + 1] = negative_infinity();
            }
        }
    }
}

}  // namespace adaattn::mask
