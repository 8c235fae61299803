// sm80_sources.cuh -- items of the sm80 family that visit several runs of keys, one after the other.
// SPDX-License-Identifier: Apache-2.0
//
// The kernel knows one run and one interval per row. So each source is walked in coordinates of its
// own: position 0 is its first key, and the item's interval is moved and cut to its keys.
#pragma once

#include "adaattn/attn/sm80_params.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/softmax/row_state.cuh"

namespace adaattn::sm80_attn_fwd {

// The item as one of its sources sees it; its keys are 0 .. keys - 1.
ADAATTN_DEVICE work::WorkItem item_within(const work::WorkItem& item, const work::Source& source) {
    work::WorkItem own = item;
    if (source.mask == work::kMaskNone) {
        own.key_start = 0;
        own.key_stop = source.keys;
        own.start_offset = -work::kUnlimited;
        own.stop_offset = work::kUnlimited;
        return own;
    }
    own.key_start = larger(item.key_start - source.position, 0);
    own.key_stop = smaller(item.key_stop - source.position, source.keys);
    own.start_offset = item.start_offset - source.position;
    own.stop_offset = item.stop_offset - source.position;
    return own;
}

// Bit 2 m + half: whether the lane's row m, half sees a key of any source. Asked of rows whose sum
// is 0 alone, so that a long list is rarely read.
template <class T>
ADAATTN_DEVICE u32 rows_that_see(const ListedParams& params, const work::WorkItem& item,
                                 const softmax::RowState<T::kRowTiles>& state, int first_row) {
    const int lane = ptx::thread_index() & 31;
    u32 saw = 0;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            if (state.sum[m][half] != 0.0f || row >= item.rows) continue;
#pragma unroll 1
            for (int index = 0; index < item.sources; ++index) {
                const work::Source source = params.sources[item.first_source + index];
                const mask::Interval seen = mask::visible(item_within(item, source), row);
                saw |= static_cast<u32>(seen.start < seen.stop) << (2 * m + half);
            }
        }
    }
    return saw;
}

}  // namespace adaattn::sm80_attn_fwd
