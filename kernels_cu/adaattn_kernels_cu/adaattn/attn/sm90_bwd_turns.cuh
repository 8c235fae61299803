// sm90_bwd_turns.cuh -- where a block is in its walk, and whose turn it is to add to dq.
// SPDX-License-Identifier: Apache-2.0
//
// T is the Traits of sm90_attn_bwd_f16. With kInOrder the blocks of one head add to a tile of
// queries one after the other, the last keys first; a word per tile counts those that have.
#pragma once

#include "adaattn/attn/sm90_bwd_producer.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

// A tile of queries of one head.
struct Place {
    int tile, head;
};
ADAATTN_DEVICE Place after(const KeyWork& work, const Place& place) {
    const bool wraps = place.tile + 1 == work.end;
    return {wraps ? work.begin : place.tile + 1, place.head + wraps};
}
ADAATTN_DEVICE Place before(const KeyWork& work, const Place& place) {
    const bool wraps = place.tile == work.begin;
    return {wraps ? work.end - 1 : place.tile - 1, place.head - wraps};
}

// The word of a tile, for one half of dq's columns.
template <class T>
ADAATTN_DEVICE u32* turn(const Params& params, const KeyWork& work, const Place& place, int half) {
    const i64 plane = (static_cast<i64>(work.item.batch) * params.heads_q + place.head) * 2 + half;
    return params.turns + plane * params.len_q + work.source.first_key + place.tile * T::kTileM;
}

// Waits until the blocks of all later keys that see any of a tile's queries have added: those up to
// the last whose first visible query comes before the tile's (or the sequence's) end.
template <class T>
ADAATTN_DEVICE void wait_turn(const Params& params, const KeyWork& work, const Place& place,
                              int half) {
    const int past = smaller((place.tile + 1) * T::kTileM, work.source.keys);
    const int room = past - 1 - work.item.start_offset;
    const int later = room < 0 ? 0 : smaller(room / T::kTileN, work.tiles_after);
    while (ptx::load_acquire(turn<T>(params, work, place, half)) != static_cast<u32>(later)) {
    }
}

// This thread's last addition has landed: the next block may add to that tile.
template <class T>
ADAATTN_DEVICE void pass_turn(const Params& params, const KeyWork& work, const Place& place,
                              int half) {
    ptx::bulk_wait();
    ptx::add_release(turn<T>(params, work, place, half), 1);
}

}  // namespace adaattn::sm90_attn_bwd_f16
