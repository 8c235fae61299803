// work_item.cuh -- what one thread block computes next, and the walk over its key tiles. SPDX-License-Identifier: Apache-2.0
//
// A work item is one tile of query rows of one head, with the keys that it may see given as sources: runs of consecutive rows of
// some key/value tensor. The kernel takes items as they come and knows nothing of masks' names, batches or policies; the host (or
// a planning kernel) writes them. Layouts are mirrored in adaattn_cuda/sm90.py.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn {

struct WorkItem {
    i32 batch;         // coordinate in the query, output and lse arrays
    i32 head;          // likewise
    i32 row_first;     // first query row of the tile
    i32 rows;          // rows that exist, 1 .. tile_m; 0 marks the end of a block's list
    i32 tiles;         // key tiles over all sources, at least 1: rows that see nothing get one tile that is masked throughout
    i32 sources;       // sources used, 1 .. kMaxSources
    i32 key_start;     // row r of the tile sees the positions p with
    i32 key_stop;      //   max(key_start, start_offset + r) <= p < min(key_stop, stop_offset + r)
    i32 start_offset;  //   (all within +-2^30; half of that stands for "no limit")
    i32 stop_offset;
    i32 reserved[2];
};

struct Source {
    i32 map;         // which pair of key and value tensors
    i32 batch;       // coordinates in those tensors
    i32 head;
    i32 first;       // first key row
    i32 keys;        // how many, at least 1
    i32 position;    // position of the first key, for the mask above
    i32 masked;      // 0: every key is visible to every row, whatever its position
    i32 bias_first;  // index of the first key's bias, where the kernel takes one
};

static_assert(sizeof(WorkItem) == 48 && sizeof(Source) == 32, "mirrored by the host");

template <int kMaxSources>
struct alignas(16) WorkRecord {
    WorkItem item;
    Source sources[kMaxSources];
};

// Walks the key tiles of an item from the last to the first: under a causal mask the tiles that need masking come first, and the
// running maximum starts where the scores of a trained model are largest.
template <int kTileN, int kMaxSources>
struct TileCursor {
    const WorkRecord<kMaxSources>* record;
    int source;
    int tile;

    __device__ __forceinline__ void open(const WorkRecord<kMaxSources>& item_record) {
        record = &item_record;
        source = kMaxSources > 1 ? item_record.item.sources - 1 : 0;
        tile = ceil_div(current().keys, kTileN) - 1;
    }
    __device__ __forceinline__ void next() {
        --tile;
        if constexpr (kMaxSources > 1) {
            if (tile < 0) {
                --source;
                tile = ceil_div(current().keys, kTileN) - 1;
            }
        }
    }
    __device__ __forceinline__ bool at_last() const { return tile == 0 && source == 0; }
    __device__ __forceinline__ const WorkItem& item() const { return record->item; }
    __device__ __forceinline__ const Source& current() const { return record->sources[source]; }
    __device__ __forceinline__ int first_key() const { return current().first + tile * kTileN; }
    __device__ __forceinline__ int position() const { return current().position + tile * kTileN; }
    // Keys of this tile that belong to the source; the rest of a last tile is whatever lies behind it in memory.
    __device__ __forceinline__ int keys_left() const { return current().keys - tile * kTileN; }
};

}  // namespace adaattn
