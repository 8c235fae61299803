// far_select.cuh -- nested landmark sets of a group: for every level the code from which a key is a landmark, and how many there are.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per listed group and head: 1. a histogram of the codes of its far keys; 2. masses summed up from the
//              smallest code on; 3. level k's threshold is the largest code below which at most tau_k of the sampled rows' mass
//              remains, lowered as far as the landmarks still fit the key tiles that they begin, one at least: those cost
//              nothing more. One ordering serves every level, so the sets are nested, and no sort is needed.
// Numerics     Counts are integers; a mass is that of the code's middle. The sums are made in ascending order by one warp.
// Tiles        256 threads; codes are read 16 bytes at a time.
// Shared mem   histograms: i32, 8 x 256 (one a warp); masses: f32, 257; counts: i32, 257.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=16384
// Limits       far_keys a multiple of 64; rows of codes start on 16 bytes.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"

namespace adaattn::far_select {

struct Params {
    far::Sizes sizes;
    const far::Group* groups;
    const i32* group_list;
    const i32* decision;         // heads below 0 are passed over; null: none is
    const unsigned char* codes;  // (batch, heads_q, groups, code_stride)
    far::Selection* selections;  // (batch, heads_q, groups, kLevelsMax)
    i32*
        tile_counts;  // (batch, heads_q, groups, kLevelsMax, tile_stride): landmarks before a tile's near field
    float tau[far::kLevelsMax];  // ascending: level 0 has the most landmarks
    i32 listed;
    i32 tile_stride;
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

// The thresholds of every level, by one warp.
template <class T>
ADAATTN_DEVICE void choose(const Params& params, const int (&total)[256], float (&below)[257],
                           int (&above)[257], far::Selection* chosen, far::Selection* out) {
    const far::Sizes& sizes = params.sizes;
    // Each lane sums eight codes, then the lanes meet: always in the same order.
    const int lane = static_cast<int>(threadIdx.x);
    float own = 0.0f;
    int own_count = 0;
    for (int i = 0; i < 8; ++i) {
        const int code = 8 * lane + i;
        below[code] = own;
        own += total[code] * far::mass_of(code);
        own_count += total[code];
    }
    float before = own;
    int after = own_count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(kFullWarp, before, step);
        const int other_count = __shfl_down_sync(kFullWarp, after, step);
        if (lane >= step) before += other;
        if (lane + step < 32) after += other_count;
    }
    before -= own;       // mass of the lanes before this one
    after -= own_count;  // keys of the lanes after it
    for (int i = 0; i < 8; ++i) below[8 * lane + i] += before;
    for (int i = 7, keys = after; i >= 0; --i) above[8 * lane + i] = keys += total[8 * lane + i];
    if (lane == 31) {
        below[256] = before + own;
        above[256] = 0;
    }
    __syncwarp();
    for (int level = 0; level < sizes.levels; ++level) {
        const float allowed = params.tau[level] * static_cast<float>(sizes.samples);
        // The largest threshold whose smaller codes carry no more than allowed; 256 keeps no landmark.
        int threshold = 0;
        for (int i = 0; i < 8; ++i) {
            const int candidate = 8 * lane + i + 1;
            if (below[candidate] <= allowed) threshold = candidate;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            threshold = larger(threshold, __shfl_xor_sync(kFullWarp, threshold, step));
        const int room = larger(round_up(above[threshold], far::kSlotRows), far::kSlotRows);
        for (int i = 7; i >= 0; --i) {
            if (above[8 * lane + i] <= room) threshold = smaller(threshold, 8 * lane + i);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            threshold = smaller(threshold, __shfl_xor_sync(kFullWarp, threshold, step));
        if (lane == 0) {
            chosen[level] = out[level] = far::Selection{threshold, above[threshold]};
        }
    }
}

// How many landmarks lie before each tile's near field: all, less those from there on. A warp takes a level at a time.
template <class T>
ADAATTN_DEVICE void count_before_tiles(const Params& params, i64 row, const far::Group& own,
                                       const far::Selection* chosen) {
    const far::Sizes& sizes = params.sizes;
    const unsigned char* codes = params.codes + row * sizes.code_stride;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    for (int level = static_cast<int>(threadIdx.x) / kWarpThreads; level < sizes.levels;
         level += T::kWarps) {
        int count = chosen[level].count;
        int stop = own.far_keys;
        i32* out = params.tile_counts + (row * far::kLevelsMax + level) * params.tile_stride;
        for (int tile = own.tiles - 1; tile >= 0; --tile) {
            const int first = smaller(sizes.near_first(own.tile_first + tile), own.far_keys);
            int later = 0;
            for (int key = first + lane; key < stop; key += kWarpThreads)
                later += codes[key] >= chosen[level].threshold;
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
                later += __shfl_xor_sync(kFullWarp, later, step);
            count -= later;
            stop = first;
            if (lane == 0) out[tile] = count;
        }
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int counts[T::kWarps][256];
    __shared__ int total[256];
    __shared__ float below[257];  // mass of all codes smaller than this one
    __shared__ int above[257];    // keys of this code and all larger ones
    const far::Sizes& sizes = params.sizes;
    const int group = params.group_list[blockIdx.x % params.listed];
    const int head = static_cast<int>(blockIdx.x / params.listed);  // of batch * heads_q
    if (params.decision != nullptr && params.decision[head] < 0) return;
    const int far_keys = params.groups[group].far_keys;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    for (int i = static_cast<int>(threadIdx.x); i < T::kWarps * 256; i += T::kThreads)
        counts[i / 256][i % 256] = 0;
    __syncthreads();
    const i64 row = static_cast<i64>(head) * sizes.groups + group;
    const uint4* codes = reinterpret_cast<const uint4*>(params.codes + row * sizes.code_stride);
    for (int i = static_cast<int>(threadIdx.x); i < far_keys / 16; i += T::kThreads) {
        const uint4 words = codes[i];
        const u32 all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
#pragma unroll
            for (int b = 0; b < 4; ++b) atomicAdd(&counts[warp][all[w] >> (8 * b) & 255u], 1);
        }
    }
    __syncthreads();
    for (int code = static_cast<int>(threadIdx.x); code < 256; code += T::kThreads) {
        int sum = 0;
        for (int w = 0; w < T::kWarps; ++w) sum += counts[w][code];
        total[code] = sum;
    }
    __syncthreads();
    __shared__ far::Selection chosen[far::kLevelsMax];
    if (warp == 0)
        choose<T>(params, total, below, above, chosen, params.selections + row * far::kLevelsMax);
    __syncthreads();
    count_before_tiles<T>(params, row, params.groups[group], chosen);
}

}  // namespace adaattn::far_select
