// far_gather.cuh -- copies the landmarks of a group, in order of position, into a compact buffer of keys and values.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per slot (a group of one head at one level): walks over the far keys in stretches of 4,096; every
//              stretch: flags (code >= threshold), their prefix sums over the block, positions to shared memory, then whole rows
//              of K and V in pieces of 16 bytes.
// Numerics     Copies only.
// Tiles        256 threads, sixteen codes a thread and stretch.
// Shared mem   positions: i32, 4,096; warp sums: i32, 8.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=32768
// Limits       rows of K, V and of the buffers start on 16 bytes; dims multiples of 8; far_keys a multiple of 64.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"

namespace adaattn::far_gather {

// Where a slot's landmarks go; written by the host (judged groups) or by far_work (all groups).
struct Slot {
    i32 head;  // of batch * heads_q; -1: nothing to do
    i32 group;
    i32 level;
    i32 row_first;  // in the landmark buffer
};

struct Params {
    far::Sizes sizes;
    far::Rows key;
    far::Rows value;
    const far::Group* groups;
    const unsigned char* codes;
    const far::Selection* selections;
    const Slot* slots;
    u16* landmark_key;    // (landmark_rows, dim_qk)
    u16* landmark_value;  // (landmark_rows, dim_v)
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kStretch = 16 * kThreads;
    static constexpr int kSmemBytes = 0;
};

ADAATTN_DEVICE void copy_row(u16* to, const u16* from, int dim, int lane, int lanes) {
    for (int piece = lane; piece < dim / 8; piece += lanes) {
        reinterpret_cast<uint4*>(to)[piece] = __ldg(reinterpret_cast<const uint4*>(from) + piece);
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int positions[T::kStretch];
    __shared__ int warp_sums[T::kWarps];
    const far::Sizes& sizes = params.sizes;
    const Slot slot = params.slots[blockIdx.x];
    if (slot.head < 0) return;
    const far::Group own = params.groups[slot.group];
    const i64 row = static_cast<i64>(slot.head) * sizes.groups + slot.group;
    const uint4* codes = reinterpret_cast<const uint4*>(params.codes + row * sizes.code_stride);
    const u32 threshold =
        static_cast<u32>(params.selections[row * far::kLevelsMax + slot.level].threshold);
    const int batch = slot.head / sizes.heads_q;
    const int head_kv = slot.head % sizes.heads_q / (sizes.heads_q / sizes.heads_kv);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    int done = 0;  // landmarks of earlier stretches
    for (int first = 0; first < own.far_keys; first += T::kStretch) {
        const int key = first + 16 * thread;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (key < own.far_keys) words = codes[key / 16];
        const u32 all[4] = {words.x, words.y, words.z, words.w};
        u32 flags = 0;
#pragma unroll
        for (int b = 0; b < 16; ++b)
            flags |= static_cast<u32>((all[b / 4] >> (8 * (b % 4)) & 255u) >= threshold) << b;
        if (key >= own.far_keys) flags = 0;
        const int mine = __popc(flags);
        int before = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kFullWarp, before, step);
            if (lane >= step) before += other;
        }
        if (lane == 31) warp_sums[warp] = before;
        __syncthreads();  // also: the positions of the last stretch were read
        int total = 0;
        int earlier = 0;
        for (int w = 0; w < T::kWarps; ++w) {
            if (w == warp) earlier = total;
            total += warp_sums[w];
        }
        before += earlier - mine;
        int place = before;
        while (flags != 0) {
            positions[place++] = key + __ffs(static_cast<int>(flags)) - 1;
            flags &= flags - 1;
        }
        __syncthreads();
        for (int i = thread / 8; i < total; i += T::kThreads / 8) {
            const i64 to = static_cast<i64>(slot.row_first) + done + i;
            copy_row(params.landmark_key + to * sizes.dim_qk,
                     params.key.at(batch, head_kv, positions[i]), sizes.dim_qk, thread % 8, 8);
            copy_row(params.landmark_value + to * sizes.dim_v,
                     params.value.at(batch, head_kv, positions[i]), sizes.dim_v, thread % 8, 8);
        }
        done += total;
    }
    // A tile of the forward kernel multiplies what lies behind the last landmark by 0: it must be finite.
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4* values = reinterpret_cast<uint4*>(params.landmark_value);
    const i64 first_piece = (static_cast<i64>(slot.row_first) + done) * (sizes.dim_v / 8);
    const i64 stop_piece =
        (static_cast<i64>(slot.row_first) + round_up(done, far::kSlotRows)) * (sizes.dim_v / 8);
    for (i64 i = first_piece + thread; i < stop_piece; i += T::kThreads) values[i] = zero;
}

}  // namespace adaattn::far_gather
