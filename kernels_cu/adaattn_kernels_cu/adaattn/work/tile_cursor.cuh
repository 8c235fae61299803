// tile_cursor.cuh -- the walk over the key tiles of a work item.
// SPDX-License-Identifier: Apache-2.0
//
// From the last tile to the first: under a causal mask the tiles that need masking come first, and
// the running maximum starts where the scores of a trained model are largest.
#pragma once

#include "adaattn/work/work_item.cuh"

namespace adaattn::work {

template <int kTileN, int kMaxSources>
struct TileCursor {
    const WorkRecord<kMaxSources>* record;
    int source;
    int tile;

    ADAATTN_DEVICE void open(const WorkRecord<kMaxSources>& item_record) {
        record = &item_record;
        source = kMaxSources > 1 ? item_record.item.sources - 1 : 0;
        tile = ceil_div(current().keys, kTileN) - 1;
    }
    ADAATTN_DEVICE void next() {
        --tile;
        if constexpr (kMaxSources > 1) {
            if (tile < 0) {
                --source;
                tile = ceil_div(current().keys, kTileN) - 1;
            }
        }
    }
    ADAATTN_DEVICE bool at_last() const { return tile == 0 && source == 0; }
    ADAATTN_DEVICE const WorkItem& item() const { return record->item; }
    ADAATTN_DEVICE const Source& current() const { return record->sources[source]; }
    ADAATTN_DEVICE int first_key() const { return current().first_key + tile * kTileN; }
    ADAATTN_DEVICE int position() const { return current().position + tile * kTileN; }
    // Keys of this tile that belong to the source; the rest of a last tile is whatever lies behind
    // it in memory.
    ADAATTN_DEVICE int keys_left() const { return current().keys - tile * kTileN; }
};

}  // namespace adaattn::work
