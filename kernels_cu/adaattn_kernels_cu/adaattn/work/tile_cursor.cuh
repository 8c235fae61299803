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

    ADAATTN_DEVICE void open(const WorkRecord<kMaxSources>& item_record, const Source*) {
        record = &item_record;
        source = kMaxSources > 1 ? item_record.item.sources - 1 : 0;
        tile = ceil_div(current().keys, kTileN) - 1;
    }
    ADAATTN_DEVICE void next(const Source*) {
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

// The same over any number of runs of one head's own keys, read from the table one by one. All of
// an item's are of the batch entry and head of its first, and are masked by the item's interval.
template <int kTileN>
struct TileCursor<kTileN, kFromTable> {
    const WorkRecord<kFromTable>* record;
    Source run;
    int source;
    int tile;

    ADAATTN_DEVICE void open(const WorkRecord<kFromTable>& item_record, const Source* table) {
        record = &item_record;
        source = item_record.item.sources - 1;
        load(table);
    }
    ADAATTN_DEVICE void next(const Source* table) {
        --tile;
        if (tile < 0) {
            --source;
            load(table);
        }
    }
    ADAATTN_DEVICE bool at_last() const { return tile == 0 && source == 0; }
    ADAATTN_DEVICE const WorkItem& item() const { return record->item; }
    ADAATTN_DEVICE const Source& current() const { return run; }
    ADAATTN_DEVICE int first_key() const { return run.first_key + tile * kTileN; }
    ADAATTN_DEVICE int position() const { return run.position + tile * kTileN; }
    ADAATTN_DEVICE int keys_left() const { return run.keys - tile * kTileN; }

  private:
    ADAATTN_DEVICE void load(const Source* table) {
        const Source& first = record->sources[0];
        const int2 pair =
            __ldg(reinterpret_cast<const int2*>(&table[record->item.first_source + source].keys));
        run = {kOriginal, first.batch, first.head,    first.first_key - first.position + pair.y,
               pair.x,    pair.y,      kMaskInterval, kNoBias};
        tile = ceil_div(pair.x, kTileN) - 1;
    }
};

}  // namespace adaattn::work
