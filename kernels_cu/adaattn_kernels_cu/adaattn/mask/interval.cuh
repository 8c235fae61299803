// interval.cuh -- masks as one interval of visible positions per query row.
// SPDX-License-Identifier: Apache-2.0
//
// Causal (both alignments), sliding windows, key lengths and ragged batches all let row r of a tile
// see the positions [max(key_start, start_offset + r), min(key_stop, stop_offset + r)): a work item
// carries those four numbers. Both ends grow with the row. The twin is adaattn_core.Mask.intervals.
#pragma once

#include "adaattn/work/work_item.cuh"

namespace adaattn::mask {

using work::Source;
using work::WorkItem;

// Keys start <= key < stop; empty where stop <= start.
struct Interval {
    int start, stop;
    ADAATTN_DEVICE bool holds(int key) const { return key >= start && key < stop; }
};

// Positions that row `row` of the tile sees.
ADAATTN_DEVICE Interval visible(const WorkItem& item, int row) {
    return {larger(item.key_start, item.start_offset + row),
            smaller(item.key_stop, item.stop_offset + row)};
}

// Columns of a key tile that a row sees; the tile begins at `position` and holds `keys_left` keys.
ADAATTN_DEVICE Interval visible_columns(const WorkItem& item, const Source& source, int position,
                                        int keys_left, int row) {
    if (source.mask == work::kMaskNone) return {0, keys_left};
    const Interval seen = visible(item, row);
    return {seen.start - position, smaller(seen.stop - position, keys_left)};
}

}  // namespace adaattn::mask
