// far_list.cuh -- items of a work list: what a landmark head computes tile by tile, or an exact one. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A thread an item. Its place follows from the head's rank, since every head has as many tiles: section by section,
//              tile by tile, the section's heads one after the other (far_items.cuh).
//              Landmark heads: near field + landmarks + pools, but for tiles that would cost no less exactly; the last `tail`
//              tiles were computed with the rows that certify (far_merge) and have no item. Exact heads: all keys.
// Numerics     Integers.
// Tiles        256 threads.
// Shared mem   none.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=1024
// Limits       items below 2^31 / 3.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/plan/far_items.cuh"

namespace adaattn::far_list {

struct Params {
    far::Sizes sizes;
    const far::Group* groups;
    const i32* tile_counts;
    const far_gather::Slot* slots;  // (batch, heads_q, groups)
    const i32* pool_first;          // of the same shape
    far::List landmarks;
    far::List exact;
    far::List narrow;  // exact heads that run in 8 bits first
    u64* kept;         // (batch, heads_q): scores computed by landmark heads
    i32 tile_stride;
    i32 tail;              // last tiles of a landmark head that have no item
    i32 landmark_threads;  // threads that write landmark heads; behind them those
    i32 exact_threads;     // that write exact ones, then those that write heads in 8 bits
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT;
    static constexpr int kSmemBytes = 0;
};

// Scores that the rows of an item compute with the keys from `first` on.
ADAATTN_DEVICE u64 scores_from(const far::Sizes& sizes, const work::WorkItem& item, int first) {
    const u64 rows = static_cast<u64>(item.rows);
    if (!sizes.causal) return rows * static_cast<u64>(sizes.len_kv - first);
    const int low = sizes.visible(item.row_first) - first;  // each further row sees one more
    return rows * static_cast<u64>(larger(low, 0)) + rows * (rows - 1) / 2;
}

ADAATTN_DEVICE void write_exact(const Params& params, const far::List& list, int rank, int index) {
    const far::Sizes& sizes = params.sizes;
    const far::Place place = list.places[rank];
    const int number = list.number(place, rank, index);
    const int row_first = index * list.tile;
    const int stop =
        sizes.causal ? smaller(sizes.len_kv, row_first + list.tile + sizes.offset) : sizes.len_kv;
    work::WorkItem item = far::item_of(sizes, place.head, row_first, list.tile, number,
                                       ceil_div(larger(stop, 1), list.tile_n));
    item.sources = 1;
    list.sources[3 * number] = far::keys_of(sizes, item, 0, stop);
    list.items[number] = item;
}

ADAATTN_DEVICE void write_landmarks(const Params& params, int rank, int index) {
    const far::Sizes& sizes = params.sizes;
    const far::List& list = params.landmarks;
    const far::Place place = list.places[rank];
    const int number = list.number(place, rank, index);
    const int group = index / params.groups[0].tiles;
    const int slot = place.head * sizes.groups + group;
    const int stop = sizes.near_stop(index);
    const int dense = ceil_div(larger(stop, 1), list.tile_n);
    int first = sizes.near_first(index);
    int landmarks = 0;
    int tiles = dense;
    if (first > 0) {
        const far_gather::Slot own = params.slots[slot];
        landmarks = params.tile_counts[(static_cast<i64>(slot) * far::kLevelsMax + own.level) *
                                           params.tile_stride +
                                       index - params.groups[group].tile_first];
        tiles = ceil_div(stop - first, list.tile_n) + ceil_div(landmarks, list.tile_n) +
                ceil_div(first / far::kPoolKeys, list.tile_n);
    }
    if (tiles >= dense) {
        first = 0;
        landmarks = 0;
        tiles = dense;
    }
    work::WorkItem item =
        far::item_of(sizes, place.head, index * list.tile, list.tile, number, tiles);
    item.sources =
        far::sources_of(sizes, item, first, stop, params.pool_first[slot],
                        params.slots[slot].row_first, landmarks, list.sources + 3 * number);
    list.items[number] = item;
    const u64 far_scores =
        static_cast<u64>(item.rows) * static_cast<u64>(landmarks + first / far::kPoolKeys);
    u64 kept = far_scores + scores_from(sizes, item, first);
    if (index == 0) {
        for (int tail = sizes.tiles - params.tail; tail < sizes.tiles; ++tail)
            kept += scores_from(
                sizes, far::item_of(sizes, place.head, tail * list.tile, list.tile, 0, 0), 0);
    }
    atomicAdd(params.kept + place.head, kept);
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const int thread = static_cast<int>(blockIdx.x) * T::kThreads + static_cast<int>(threadIdx.x);
    if (thread < params.landmark_threads) {
        const int rank = thread / params.landmarks.tiles;
        if (rank < params.landmarks.queue->reserved[0])
            write_landmarks(params, rank, thread % params.landmarks.tiles);
    } else {
        const int behind = thread - params.landmark_threads;
        const bool narrow = behind >= params.exact_threads;
        const far::List& list = narrow ? params.narrow : params.exact;
        if (list.tiles == 0) return;
        const int own = narrow ? behind - params.exact_threads : behind;
        const int rank = own / list.tiles;
        if (rank < list.queue->reserved[0]) write_exact(params, list, rank, own % list.tiles);
    }
}

}  // namespace adaattn::far_list
