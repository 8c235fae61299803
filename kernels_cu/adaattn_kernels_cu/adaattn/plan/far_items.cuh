// far_items.cuh -- how planning kernels write an item of the forward kernel and its sources. SPDX-License-Identifier: Apache-2.0
//
// An item takes three places in the table of sources. A list is a queue that blocks take items from, in order, or dealt to the
// blocks; behind a block's last item, or the queue's, stands one without rows. Blocks claim an item while they compute the one
// before it. Where items differ much and are few a block, dealing them forwards and backwards in turn, longest first, keeps
// loads more even than that. Sections follow one another so that lengths never jump, which dealing in turn would not even out:
// the last one's items fall, the one's before rise, and so on.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::far {

// Where one head of a list stands: `rank` is its index here. Heads that share what L2 holds are a section; their items alternate.
struct Place {
    i32 head;    // of batch * heads_q
    i32 first;   // rank of the section's first head
    i32 beside;  // heads of the section
    i32 rising;  // 1: its items stand from the shortest to the longest
};

// A list of items that a launch of the forward kernel takes; written anew for every launch.
struct List {
    work::WorkItem* items;
    work::Source* sources;  // three places an item
    work::Queue* queue;
    Place* places;  // one a head
    i32 tile;       // query rows of a tile
    i32 tile_n;     // keys of a tile of the forward kernel
    i32 tiles;      // of a head
    i32 blocks;     // of the launch that items are dealt to; 0: a queue

    // Opens a list of `heads` heads, before its items are written. The whole block of `threads` calls.
    ADAATTN_DEVICE void open(int heads, int threads) const {
        const work::WorkItem end = {};
        const int total = heads * tiles;
        // Blocks end within the last round or behind it.
        const int first = blocks > 0 ? total / blocks * blocks : total;
        const int ends = blocks > 0 ? 2 * blocks : 1;
        for (int i = static_cast<int>(threadIdx.x); i < ends; i += threads) items[first + i] = end;
        if (threadIdx.x == 0) {
            queue->next = 0;
            queue->items = total;
            queue->reserved[0] = heads;
        }
    }
    // Where an item stands: by tiles, of which the last is the longest, and the section's heads one after the other.
    ADAATTN_DEVICE int number(const Place& place, int rank, int index) const {
        const int turn = place.rising ? index : tiles - 1 - index;
        const int number = place.first * tiles + turn * place.beside + rank - place.first;
        if (blocks == 0) return number;
        const int round = number / blocks;
        const int column = number % blocks;
        return round * blocks + (round % 2 == 0 ? column : blocks - 1 - column);
    }
};

// An item of rows [row_first, row_first + tile) without its sources.
ADAATTN_DEVICE work::WorkItem item_of(const Sizes& sizes, int head, int row_first, int tile,
                                      int number, int tiles) {
    work::WorkItem item = {};
    item.batch = head / sizes.heads_q;
    item.head = head % sizes.heads_q;
    item.row_first = row_first;
    item.rows = smaller(tile, sizes.len_q - row_first);
    item.first_source = 3 * number;
    item.tiles = tiles;
    item.partial = work::kNoPartial;
    item.key_start = 0;
    item.key_stop = sizes.len_kv;
    item.start_offset = -work::kUnlimited;
    item.stop_offset = sizes.causal ? row_first + sizes.offset + 1 : work::kUnlimited;
    item.heads = 1;
    return item;
}

// The keys [first, stop) themselves.
ADAATTN_DEVICE work::Source keys_of(const Sizes& sizes, const work::WorkItem& item, int first,
                                    int stop) {
    work::Source keys = {};
    keys.tensor = work::kOriginal;
    keys.batch = item.batch;
    keys.head = item.head / (sizes.heads_q / sizes.heads_kv);
    keys.first_key = first;
    keys.keys = larger(stop - first, 1);
    keys.position = first;
    keys.mask = work::kMaskInterval;
    keys.first_bias = work::kNoBias;
    return keys;
}

// Pools, landmarks and the near field of an item, in the order in which they are summed last to first; returns how many.
ADAATTN_DEVICE int sources_of(const Sizes& sizes, const work::WorkItem& item, int first, int stop,
                              int pool_first, int landmark_first, int landmarks, work::Source* to) {
    int sources = 0;
    if (first > 0) {
        work::Source pools = {};
        pools.tensor = work::kPooled;
        pools.first_key = pool_first;
        pools.keys = first / kPoolKeys;
        pools.first_bias = pools.first_key;
        to[sources++] = pools;
    }
    if (landmarks > 0) {
        work::Source gathered = {};
        gathered.tensor = work::kGathered;
        gathered.first_key = landmark_first;
        gathered.keys = landmarks;
        gathered.first_bias = work::kNoBias;
        to[sources++] = gathered;
    }
    if (stop > first || sources == 0) to[sources++] = keys_of(sizes, item, first, stop);
    return sources;
}

// Sum over the block before this thread of one number a thread; `total` is the same everywhere. `space` holds an int a warp.
template <int kThreads>
ADAATTN_DEVICE int block_before(int own, int& total, int* space) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) space[warp] = sum;
    __syncthreads();
    total = 0;
    int earlier = 0;
    for (int w = 0; w < kThreads / kWarpThreads; ++w) {
        if (w == warp) earlier = total;
        total += space[w];
    }
    return earlier + sum - own;
}

// Ranks the heads that `chosen` says, and opens their list. Heads of one section, `section_heads` key heads, stay together.
// The whole block calls.
template <int kThreads, class Chosen>
ADAATTN_DEVICE void rank_heads(const Sizes& sizes, const List& list, int section_heads,
                               const Chosen& chosen, int* space) {
    const int thread = static_cast<int>(threadIdx.x);
    const int heads = sizes.batch * sizes.heads_q;
    int ranked = 0;
    for (int first = 0; first < heads; first += kThreads) {
        const int head = first + thread;
        const bool own = head < heads && chosen(head);
        int total;
        const int rank = ranked + block_before<kThreads>(own ? 1 : 0, total, space);
        if (own) list.places[rank].head = head;
        ranked += total;
    }
    __syncthreads();
    const int ratio = sizes.heads_q / sizes.heads_kv * section_heads;  // query heads of a section
    for (int rank = thread; rank < ranked; rank += kThreads) {
        const int section = list.places[rank].head / ratio;
        int low = rank;
        int high = rank + 1;
        while (low > 0 && list.places[low - 1].head / ratio == section) --low;
        while (high < ranked && list.places[high].head / ratio == section) ++high;
        int later = 0;  // sections
        for (int r = high; r < ranked; ++r)
            later += list.places[r].head / ratio != list.places[r - 1].head / ratio;
        list.places[rank].first = low;
        list.places[rank].beside = high - low;
        list.places[rank].rising = later % 2;
    }
    list.open(ranked, kThreads);
}

}  // namespace adaattn::far
