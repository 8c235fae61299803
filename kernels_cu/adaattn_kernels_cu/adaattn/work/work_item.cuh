// work_item.cuh -- what one thread block computes next: a query tile, and sources of keys for it.
// SPDX-License-Identifier: Apache-2.0
//
// A work item is one tile of query rows of one head (or of a group of heads packed together). The
// keys that it visits are `sources` consecutive entries of a table of sources, from `first_source`
// on: runs of consecutive rows of some pair of key and value arrays. A dense head is one source; a
// near field of the original keys, gathered landmarks and pooled keys with their bias are three.
// Entries may be shared by items. Kernels take items as they come and know nothing of masks'
// names, batches or policies; the host or a planning kernel writes them. The twins, byte for byte,
// are ITEM and SOURCE of adaattn_cuda/work/records.py.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::work {

// Most rows or keys of an array, and the window extent that stands for "no limit": it reaches
// every key from every row, and sums of three stay within 32 bits.
constexpr i32 kUnlimited = 1 << 29;

constexpr i32 kNoPartial = -1;
constexpr i32 kNoBias = -1;

struct alignas(16) WorkItem {
    i32 batch;         // coordinates in the query, output and lse arrays
    i32 head;          // the first, where `heads` are packed
    i32 row_first;     // first query row of the tile
    i32 rows;          // rows that exist, 1 .. tile_m; 0 marks the end of a block's list
    i32 first_source;  // index into the table of sources
    i32 sources;       // how many, at least 1
    i32 tiles;         // key tiles over all sources, at least 1: what the item costs
    i32 partial;       // kNoPartial: out and lse are written; else where the partial result goes
    i32 key_start;     // row r of the tile sees the positions p with
    i32 key_stop;      //   max(key_start, start_offset + r) <= p < min(key_stop, stop_offset + r)
    i32 start_offset;  //   in sources that carry kMaskInterval
    i32 stop_offset;
    i32 heads;  // query heads packed into the tile, row r being that of head + r % heads; 1: none
    i32 row_stops;  // kernels of exact rows: where the rows' own limits begin in their table
    float
        skip_log2;  // score-then-skip: log2 of the least weight that keeps a tile, below 0; 0: keep all
    i32 code_shift;  // from a key's row in the arrays to its row among a quantiser's codes
};

// Which pair of key and value arrays a source reads.
enum Tensor : i32 { kOriginal = 0, kGathered = 1, kPooled = 2, kTensors = 3 };

enum MaskFlag : i32 {
    kMaskNone = 0,      // every key is visible to every row, whatever its position
    kMaskInterval = 1,  // the item's interval holds
};

struct alignas(16) Source {
    i32 tensor;      // a Tensor
    i32 batch;       // coordinates in its arrays
    i32 head;        //
    i32 first_key;   // first key row
    i32 keys;        // how many, at least 1
    i32 position;    // position of the first key, for the mask
    i32 mask;        // of MaskFlag
    i32 first_bias;  // index of the first key's bias, or kNoBias
};

static_assert(sizeof(WorkItem) == 64 && sizeof(Source) == 32, "mirrored by the host");

// Where the blocks of a launch take their items from, one after the other, if a planning kernel wrote
// the list: behind the last item stands one without rows.
struct alignas(16) Queue {
    i32 next;  // 0 before a launch
    i32 items;
    i32 reserved[2];
};

// Room for sources in a record: none but the first, the others are read from the table.
constexpr int kFromTable = 0;

// An item together with its sources, as a kernel keeps it in shared memory.
template <int kMaxSources>
struct WorkRecord {
    WorkItem item;
    Source sources[kMaxSources == kFromTable ? 1 : kMaxSources];
};

// Source `index` of a record's item; `table` is the launch's.
template <int kMaxSources>
ADAATTN_DEVICE const Source& source_of(const WorkRecord<kMaxSources>& record,
                                       [[maybe_unused]] const Source* table, int index) {
    if constexpr (kMaxSources == kFromTable) return table[record.item.first_source + index];
    return record.sources[index];
}

}  // namespace adaattn::work
