// decode_stream.cuh -- a warp's ring of slices: what is copied next, and what may be read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_feed.cuh"

namespace adaattn::smxx_attn_decode {

// Without a copy engine: a warp's slices on their way through its ring, copied by its own lanes; those
// of its chunks in their order, keys before values (kSkip: keys alone), as many as there are slots.
template <class T>
struct OwnStream {
    u32 base;  // shared, of the warp's ring
    int lane;
    int turn, start;  // slots of the next slice to be read, and to be copied
    // What is copied next: slice `slice` of a chunk; none where the chunk is not before `end`.
    Chunk chunk;
    const char *keys, *values;  // of that chunk
    const i32* table;
    int end, slice;
    i32 entry;  // of the chunk after

    ADAATTN_DEVICE static int after(int slot) { return slot + 1 == T::kStages ? 0 : slot + 1; }

    ADAATTN_DEVICE i32 entry_of(const Params& p, int number) const {
        return number < end ? table[number / p.page_chunks] : 0;
    }
    // Begins at chunk `number`; the ring is empty.
    ADAATTN_DEVICE void begin(const Params& p, int number, int stop) {
        end = stop;
        slice = 0;
        look_at(p, chunk_of(p, entry_of(p, number), number));
#pragma unroll 1
        for (int i = 0; i < T::kStages; ++i) copy(p);
    }
    ADAATTN_DEVICE void look_at(const Params& p, const Chunk& next) {
        chunk = next;
        keys = side_of<T>(p, chunk, true);
        values = side_of<T>(p, chunk, false);
        entry = entry_of(p, chunk.number + T::kWarps);
    }
    // Starts the next copy, to the slot that was read first of those that are full. Groups of copies
    // are counted: there is one for every call.
    ADAATTN_DEVICE void copy(const Params& p) {
        if (chunk.number < end) {
            const int side = slices_of<T>(chunk);
            const bool key = slice < side;
            start_slice<T>(p, chunk, key ? keys : values, key, key ? slice : slice - side,
                           base + start * T::kSlotBytes, lane);
            start = after(start);
            if (++slice == (T::kSkip ? side : 2 * side)) {
                slice = 0;
                look_at(p, chunk_of(p, entry, chunk.number + T::kWarps));
            }
        }
        ptx::copy_async_commit();
    }
    // Address of the next slice, which has arrived for all lanes; `kHeld` before it are not
    // released yet.
    template <int kHeld>
    ADAATTN_DEVICE u32 take(const Params&) {
        ptx::copy_async_wait<T::kStages - 1 - kHeld>();
        __syncwarp();
        const u32 slot = base + turn * T::kSlotBytes;
        turn = after(turn);
        return slot;
    }
    // All lanes have read `count` slices: others may come there.
    ADAATTN_DEVICE void release(const Params& p, int count) {
        __syncwarp();
        for (int i = 0; i < count; ++i) copy(p);
    }
    // With kSkip the values of one chunk are fetched by themselves, when it is known that they count.
    ADAATTN_DEVICE u32 value_slot(int i) const { return base + (T::kStages + i) * T::kSlotBytes; }
    ADAATTN_DEVICE void fetch_values(const Params& p, const Chunk& of) {
        const char* from = side_of<T>(p, of, false);
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < slices_of<T>(of); ++i) {
            start_slice<T>(p, of, from, false, i, value_slot(i), lane);
        }
        ptx::copy_async_commit();
    }
    ADAATTN_DEVICE void await_values() {
        ptx::copy_async_wait<0>();
        __syncwarp();
    }
    ADAATTN_DEVICE void meet() const { __syncthreads(); }
};

template <class T, bool kBulk>
struct StreamOf {
    using Type = OwnStream<T>;
};
template <class T>
struct StreamOf<T, true> {
    using Type = FedStream<T>;
};
template <class T>
using Stream = typename StreamOf<T, T::kBulk>::Type;

// All slices of narrow values.
template <class T>
ADAATTN_DEVICE void take_all(const Params& p, Stream<T>& stream, u32 (&slots)[Slices<T>::kNarrow]) {
    slots[0] = stream.template take<0>(p);
    if constexpr (Slices<T>::kNarrow > 1) slots[1] = stream.template take<1>(p);
    if constexpr (Slices<T>::kNarrow > 2) {
        slots[2] = stream.template take<2>(p);
        slots[3] = stream.template take<3>(p);
    }
}

}  // namespace adaattn::smxx_attn_decode
