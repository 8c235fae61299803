// decode_feed.cuh -- one warp copies for all others: rings that the copy engine fills.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_pages.cuh"

namespace adaattn::smxx_attn_decode {

// Shared addresses of what passes between the copying warp and the others.
template <class T>
struct Rings {
    static constexpr int kEach = 2 * T::kStages + 1;  // barriers of a warp
    static constexpr int kBarriers = T::kWarps * kEach + 1;
    u32 shared;

    // A slot holds what was announced; a slot may be overwritten; values asked for are there.
    ADAATTN_DEVICE u32 full(int warp, int slot) const { return shared + 8 * (warp * kEach + slot); }
    ADAATTN_DEVICE u32 empty(int warp, int slot) const { return full(warp, T::kStages + slot); }
    ADAATTN_DEVICE u32 values(int warp) const { return full(warp, 2 * T::kStages); }
    // Every warp that looks at keys has passed here.
    ADAATTN_DEVICE u32 meeting() const { return full(T::kWarps, 0); }
    ADAATTN_DEVICE u32 ring(int warp) const {
        return shared + T::kRingAt + warp * T::kSlots * T::kSlotBytes;
    }
};

// Starts the copy of slice `i` of a side, which begins at `side`, to `slot`: one lane does it. Wide
// slices of 256 channels are 16 runs of 256 bytes.
template <class T>
ADAATTN_DEVICE void start_bulk(const Params& p, const Chunk& chunk, const char* side, bool keys,
                               int i, u32 slot, u32 barrier) {
    if (T::kDim == 256 && !chunk.narrow) {
        const char* from = side + i / 2 * 2 * kSliceBytes + i % 2 * 256;
#pragma unroll 1
        for (int run = 0; run < 16; ++run) {
            ptx::bulk_load(slot + 256 * run, from + 512 * run, 256, barrier);
        }
    } else {
        ptx::bulk_load(slot, side + i * kSliceBytes, kSliceBytes, barrier);
    }
    if (chunk.narrow && i == 0) {
        const NarrowPool& pool = keys ? p.key_narrow : p.value_narrow;
        const i64 scales = chunk.page * T::kDim;
        ptx::bulk_load(slot + kSliceBytes, pool.centre + scales, 2 * T::kDim, barrier);
        ptx::bulk_load(slot + kSliceBytes + 2 * T::kDim, pool.reach + scales, 2 * T::kDim, barrier);
    }
}
template <class T>
ADAATTN_DEVICE int bulk_bytes(const Chunk& chunk, int i) {
    return kSliceBytes + (chunk.narrow && i == 0 ? 4 * T::kDim : 0);
}

// What a lane of the copying warp does for the warp of its number: the slices of its chunks in their
// order, keys before values (kSkip: keys alone, and the chunk that it probes before all).
template <class T>
struct Feeder {
    Rings<T> rings;
    const i32* table;
    int lane;
    int start, stop;  // the warp's chunks: start, start + kWarps, ...; before stop
    int slot, slice;
    u32 parity;
    bool active, probing;
    Chunk chunk;
    const char *keys, *values;  // of that chunk
    int next;
    i32 entry;  // of the next

    ADAATTN_DEVICE i32 entry_of(const Params& p, int number) const {
        return number < stop ? table[number / p.page_chunks] : 0;
    }
    // `probe` < 0: nothing is probed.
    ADAATTN_DEVICE void begin(const Params& p, int begin, int end, int probe) {
        start = begin + lane;
        stop = end;
        slot = slice = 0;
        parity = 1u;  // a fresh barrier has passed this
        probing = probe >= 0;
        active = lane < T::kWarps && (probing || start < stop);
        if (!active) return;
        const int number = probing ? probe : start;
        const i32 here = table[number / p.page_chunks];
        next = probing ? start : start + T::kWarps;
        entry = entry_of(p, next);
        look_at(p, chunk_of(p, here, number));
    }
    ADAATTN_DEVICE void look_at(const Params& p, const Chunk& found) {
        chunk = found;
        keys = side_of<T>(p, chunk, true);
        values = side_of<T>(p, chunk, false);
    }
    // Starts the next copy, if its slot is free.
    ADAATTN_DEVICE void step(const Params& p) {
        if (!active || !ptx::mbarrier_test(rings.empty(lane, slot), parity)) return;
        const int side = slices_of<T>(chunk);
        const bool key = slice < side;
        const int i = key ? slice : slice - side;
        const u32 barrier = rings.full(lane, slot);
        ptx::mbarrier_arrive_expect(barrier, bulk_bytes<T>(chunk, i));
        start_bulk<T>(p, chunk, key ? keys : values, key, i,
                      rings.ring(lane) + slot * T::kSlotBytes, barrier);
        if (++slot == T::kStages) {
            slot = 0;
            parity ^= 1u;
        }
        if (++slice < (T::kSkip ? side : 2 * side)) return;
        slice = 0;
        active = next < stop;
        if (!active) return;
        look_at(p, chunk_of(p, entry, next));
        next += T::kWarps;
        entry = entry_of(p, next);
    }
    ADAATTN_DEVICE void run(const Params& p) {
        while (ptx::warp_any(active)) step(p);
    }
};

// The lane's barriers; of the whole warp.
template <class T>
ADAATTN_DEVICE void init_barriers(const Rings<T>& rings, int lane) {
    if (lane < T::kWarps) {
        for (int i = 0; i < Rings<T>::kEach; ++i) ptx::mbarrier_init(rings.full(lane, i), 1);
    }
    if (lane == 0) ptx::mbarrier_init(rings.meeting(), T::kWarps);
    ptx::mbarrier_init_fence();
    __syncwarp();
}

// A warp's end of its ring.
template <class T>
struct FedStream {
    Rings<T> rings;
    int lane, warp;
    int turn;  // slot that is read next
    u32 parity, value_parity;

    ADAATTN_DEVICE void begin(const Params&, int, int) {}
    ADAATTN_DEVICE u32 slot_at(int i) const { return rings.ring(warp) + i * T::kSlotBytes; }
    // Address of the next slice, which has arrived.
    template <int kHeld>
    ADAATTN_DEVICE u32 take(const Params&) {
        ptx::mbarrier_wait(rings.full(warp, turn), parity);
        __syncwarp();
        const u32 slot = slot_at(turn);
        if (++turn == T::kStages) {
            turn = 0;
            parity ^= 1u;
        }
        return slot;
    }
    // The last `count` slices taken were read: loads come before an arrival, and before the copy that
    // waits for it.
    ADAATTN_DEVICE void release(const Params&, int count) {
        __syncwarp();
        if (lane < count) {
            const int slot = turn - 1 - lane;
            ptx::mbarrier_arrive(rings.empty(warp, slot < 0 ? slot + T::kStages : slot));
        }
    }
    // With kSkip the values of one chunk are fetched by themselves, when it is known that they count.
    // What lanes have read of others there stays before what the copy engine will write.
    ADAATTN_DEVICE u32 value_slot(int i) const { return slot_at(T::kStages + i); }
    ADAATTN_DEVICE void fetch_values(const Params& p, const Chunk& of) {
        ptx::async_proxy_fence();
        __syncwarp();
        if (ptx::elect_lane()) {
            const u32 barrier = rings.values(warp);
            const int side = slices_of<T>(of);
            const char* from = side_of<T>(p, of, false);
            ptx::mbarrier_arrive_expect(barrier, (side - 1) * kSliceBytes + bulk_bytes<T>(of, 0));
#pragma unroll 1
            for (int i = 0; i < side; ++i) {
                start_bulk<T>(p, of, from, false, i, value_slot(i), barrier);
            }
        }
    }
    ADAATTN_DEVICE void await_values() {
        ptx::mbarrier_wait(rings.values(warp), value_parity);
        value_parity ^= 1u;
        __syncwarp();
    }
    // All warps that look at keys; what they wrote to shared memory before is seen.
    ADAATTN_DEVICE void meet() const {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(rings.meeting());
        ptx::mbarrier_wait(rings.meeting(), 0u);
        __syncwarp();
    }
};

}  // namespace adaattn::smxx_attn_decode
