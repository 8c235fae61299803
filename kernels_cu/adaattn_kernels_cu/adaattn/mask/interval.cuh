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
// the last row has the latest start and the first row the earliest stop.
__device__ __forceinline__ bool needed(const WorkItem& item, const Source& source, int position, int keys_left, int columns,
                                       int row_first, int row_last) {
    return visible(item, source, position, keys_left, row_last).first > 0 ||
           visible(item, source, position, keys_left, row_first).stop < columns;
}

// Replaces scores outside the two rows' intervals by -inf. A replaced score may be NaN: it is selected away, never multiplied.
template <int kCount>
__device__ __forceinline__ void apply(float (&scores)[kCount], Interval upper, Interval lower, int lane) {
    const int column = 2 * (lane % 4);
    const u32 upper_width = static_cast<u32>(larger(upper.stop - upper.first, 0));
    const u32 lower_width = static_cast<u32>(larger(lower.stop - lower.first, 0));
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int here = column + 2 * i + e;
            if (static_cast<u32>(here - upper.first) >= upper_width) scores[i + e] = negative_infinity();
            if (static_cast<u32>(here - lower.first) >= lower_width) scores[i + 2 + e] = negative_infinity();
        }
    }
}

}  // namespace adaattn::mask
