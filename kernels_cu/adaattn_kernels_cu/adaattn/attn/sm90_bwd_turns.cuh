// sm90_bwd_turns.cuh -- the threads that add dq to memory, and whose turn it is.
// SPDX-License-Identifier: Apache-2.0
//
// T is the Traits of sm90_attn_bwd_f16. With kInOrder the blocks of one head add to a tile of
// queries one after the other, the last keys first; a word per tile counts those that have.
// The consumers wait for neither memory nor turns, until kSumStages tiles are on their way.
#pragma once

#include "adaattn/attn/sm90_bwd_producer.cuh"
#include "adaattn/ptx/warpgroup.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

// A tile of queries of one head.
struct Place {
    int tile, head;
};
ADAATTN_DEVICE Place after(const KeyWork& work, const Place& place) {
    const bool wraps = place.tile + 1 == work.end;
    return {wraps ? work.begin : place.tile + 1, place.head + wraps};
}

// Waits until the blocks of all later keys that see any of a tile's queries have added: those up to
// the last whose first visible query comes before the tile's (or the sequence's) end.
template <class T>
ADAATTN_DEVICE void wait_turn(const u32* turn, const KeyWork& work, int tile) {
    const int past = smaller((tile + 1) * T::kTileM, work.source.keys);
    const int room = past - 1 - work.item.start_offset;
    const int later = room < 0 ? 0 : smaller(room / T::kTileN, work.tiles_after);
    while (ptx::load_acquire(turn) != static_cast<u32>(later)) {
    }
}

// One warp for each half of dq's columns: what their consumer wrote is added to memory.
template <class T>
ADAATTN_DEVICE void add_sums(const Params& params, u32 smem, const KeyWork& work, int half) {
    const bool starter = threadIdx.x % kWarpThreads == 0;
    Place place = {work.begin, work.first_head};
    for (int stage = 0; stage < smaller(work.count, T::kSumStages); ++stage) {
        ptx::named_barrier_arrive(sums_empty(half, stage), kSumThreads);
    }
    for (int i = 0; i < work.count; ++i) {
        const u32 stage = static_cast<u32>(i) % T::kSumStages;
        const u32 from = smem + T::kDqAt + (half * T::kSumStages + stage) * T::kDqBytes;
        const int first_query = place.tile * T::kTileM;
        const i64 plane =
            (static_cast<i64>(work.item.batch) * params.heads_q + place.head) * 2 + half;
        // Of the tile in dq's halves, and of its word.
        const i64 row = plane * params.len_q + work.source.first_key + first_query;
        ptx::named_barrier_sync(sums_full(half, stage), kSumThreads);
        if (starter) {
            const int rows = smaller(work.source.keys - first_query, T::kTileM);
            if constexpr (T::kInOrder) wait_turn<T>(params.turns + row, work, place.tile);
            ptx::bulk_reduce_add(params.d_query + row * T::kHalf, from,
                                 static_cast<u32>(rows) * T::kHalf * 4);
            ptx::bulk_commit();
            ptx::bulk_wait_read();
        }
        __syncwarp();
        if (i + T::kSumStages < work.count) {  // there is one more to come
            ptx::named_barrier_arrive(sums_empty(half, stage), kSumThreads);
        }
        if (T::kInOrder && starter) {
            ptx::bulk_wait();  // it has landed: the next block may add to that tile
            ptx::add_release(params.turns + row, 1);
        }
        place = after(work, place);
    }
    if (starter) ptx::bulk_wait();  // before the memory is gone
}

}  // namespace adaattn::sm90_attn_bwd_f16
