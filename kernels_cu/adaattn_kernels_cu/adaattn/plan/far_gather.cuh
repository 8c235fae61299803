// far_gather.cuh -- copies the landmarks of a group, in order of position, into a compact buffer of keys and values.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per slot (a group of one head at one level) and stretch of 4,096 far keys: 1. landmarks before the stretch are
//              counted; 2. flags (code >= threshold), their prefix sums over the block, positions to shared memory; 3. whole rows of
//              K and V in pieces of 16 bytes, four in flight a thread.
// Numerics     Copies only.
// Tiles        256 threads, sixteen codes a thread and stretch.
// Shared mem   positions: i32, 4,096; warp sums: i32, 8.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=32768
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

// Codes of sixteen keys that are at least `threshold`, as bits.
ADAATTN_DEVICE u32 flags_of(const uint4& words, u32 threshold) {
    const u32 all[4] = {words.x, words.y, words.z, words.w};
    u32 flags = 0;
#pragma unroll
    for (int b = 0; b < 16; ++b)
        flags |= static_cast<u32>((all[b / 4] >> (8 * (b % 4)) & 255u) >= threshold) << b;
    return flags;
}

// How many landmarks lie before `stop`, a multiple of 16; alike in all threads.
template <class T>
ADAATTN_DEVICE int count_before(const uint4* codes, u32 threshold, int stop, int* warp_sums) {
    const u32 each = smaller(static_cast<int>(threshold), 255) * 0x01010101u;
    int count = 0;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < stop / 16; i += T::kThreads) {
        const uint4 words = __ldg(codes + i);
        count += __popc(__vcmpgeu4(words.x, each)) + __popc(__vcmpgeu4(words.y, each)) +
                 __popc(__vcmpgeu4(words.z, each)) + __popc(__vcmpgeu4(words.w, each));
    }
    count = threshold > 255u ? 0 : count / 8;  // a comparison sets whole bytes
#pragma unroll
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kFullWarp, count, step);
    if (threadIdx.x % kWarpThreads == 0) warp_sums[threadIdx.x / kWarpThreads] = count;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < T::kWarps; ++w) total += warp_sums[w];
    __syncthreads();
    return total;
}

// Copies rows of one array; eight threads a row, several rows in flight a thread.
template <class T>
ADAATTN_DEVICE void copy_rows(u16* to, const far::Rows& from, int batch, int head,
                              const int* positions, int count, int dim) {
    constexpr int kAhead = 4;
    constexpr int kTeams = T::kThreads / 8;
    const int team = static_cast<int>(threadIdx.x) / 8;
    for (int first = team; first < count; first += kAhead * kTeams) {
        for (int piece = static_cast<int>(threadIdx.x) % 8; piece < dim / 8; piece += 8) {
            uint4 words[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int row = smaller(first + i * kTeams, count - 1);
                words[i] = __ldg(
                    reinterpret_cast<const uint4*>(from.at(batch, head, positions[row])) + piece);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int row = first + i * kTeams;
                if (row < count)
                    reinterpret_cast<uint4*>(to + static_cast<i64>(row) * dim)[piece] = words[i];
            }
        }
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int positions[T::kStretch];
    __shared__ int warp_sums[T::kWarps];
    const far::Sizes& sizes = params.sizes;
    const int stretches = ceil_div(sizes.len_kv, T::kStretch);
    const int slots = static_cast<int>(gridDim.x) / stretches;
    const Slot slot = params.slots[static_cast<int>(blockIdx.x) % slots];
    if (slot.head < 0) return;
    const int first = static_cast<int>(blockIdx.x) / slots * T::kStretch;
    const far::Group own = params.groups[slot.group];
    if (first >= own.far_keys) return;
    const i64 row = static_cast<i64>(slot.head) * sizes.groups + slot.group;
    const uint4* codes = reinterpret_cast<const uint4*>(params.codes + row * sizes.code_stride);
    const u32 threshold =
        static_cast<u32>(params.selections[row * far::kLevelsMax + slot.level].threshold);
    const int batch = slot.head / sizes.heads_q;
    const int head_kv = slot.head % sizes.heads_q / (sizes.heads_q / sizes.heads_kv);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    const int done = first == 0 ? 0 : count_before<T>(codes, threshold, first, warp_sums);
    const int key = first + 16 * thread;
    u32 flags = key < own.far_keys ? flags_of(codes[key / 16], threshold) : 0u;
    const int mine = __popc(flags);
    int before = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kFullWarp, before, step);
        if (lane >= step) before += other;
    }
    if (lane == 31) warp_sums[warp] = before;
    __syncthreads();
    int total = 0;
    int earlier = 0;
    for (int w = 0; w < T::kWarps; ++w) {
        if (w == warp) earlier = total;
        total += warp_sums[w];
    }
    int place = before + earlier - mine;
    while (flags != 0) {
        positions[place++] = key + __ffs(static_cast<int>(flags)) - 1;
        flags &= flags - 1;
    }
    __syncthreads();
    const i64 to = static_cast<i64>(slot.row_first) + done;
    copy_rows<T>(params.landmark_key + to * sizes.dim_qk, params.key, batch, head_kv, positions,
                 total, sizes.dim_qk);
    copy_rows<T>(params.landmark_value + to * sizes.dim_v, params.value, batch, head_kv, positions,
                 total, sizes.dim_v);
    // A tile of the forward kernel multiplies what lies behind the last landmark by 0: it must be finite.
    if (first + T::kStretch < own.far_keys) return;  // the last stretch ends the slot
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4* values = reinterpret_cast<uint4*>(params.landmark_value);
    const i64 first_piece = (to + total) * (sizes.dim_v / 8);
    const i64 stop_piece =
        (static_cast<i64>(slot.row_first) + round_up(done + total, far::kSlotRows)) *
        (sizes.dim_v / 8);
    for (i64 i = first_piece + thread; i < stop_piece; i += T::kThreads) values[i] = zero;
}

}  // namespace adaattn::far_gather
