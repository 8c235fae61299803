// far_nest.cuh -- the landmarks of a judged tile, copied once for all levels: those of the last, then what each level before it adds.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per head, judged tile and stretch of 4,096 far keys. Levels are nested, so in this order every level's
//              landmarks are the first so many rows. 1. landmarks of every level before the stretch are counted; 2. flags
//              (code >= threshold) of every level, their prefix sums over the block, positions to shared memory, by the level
//              that adds them; 3. whole rows of K and V as far_gather copies them. Keys of the tile's near field are none.
// Numerics     Copies only.
// Tiles        256 threads, sixteen codes a thread and stretch.
// Shared mem   positions: i32, 4,096; warp sums: i32, 8 x 8.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=32768
// Limits       as far_gather's; levels up to kLevelsMax.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"

namespace adaattn::far_nest {

struct Params {
    far::Sizes sizes;
    far::Rows key;
    far::Rows value;
    const far::Group* groups;
    const i32* judge_tiles;
    const unsigned char* codes;
    const far::Selection* selections;
    const i32* tile_counts;
    const far_gather::Slot* slots;  // (batch, heads_q, judges, levels): a tile's begin on one row
    u16* landmark_key;              // (landmark_rows, dim_qk)
    u16* landmark_value;            // (landmark_rows, dim_v)
    i32 tile_stride;
    i32 padding;
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kStretch = 16 * kThreads;
    static constexpr int kSmemBytes = 0;
};

// Sums over the block of a number a level and thread, alike in all threads; `space` holds one a level and warp.
template <class T>
ADAATTN_DEVICE void block_sums(const int (&own)[far::kLevelsMax], int (&total)[far::kLevelsMax],
                               int (*space)[T::kWarps]) {
    __syncthreads();
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        int sum = own[level];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
        if (threadIdx.x % kWarpThreads == 0) space[level][threadIdx.x / kWarpThreads] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        total[level] = 0;
        for (int w = 0; w < T::kWarps; ++w) total[level] += space[level][w];
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int positions[T::kStretch];
    __shared__ int space[far::kLevelsMax][T::kWarps];
    __shared__ int starts[far::kLevelsMax + 1];  // in `positions`, of what a level adds
    __shared__ int places[far::kLevelsMax];      // of these rows, from the tile's first on
    const far::Sizes& sizes = params.sizes;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    const int pairs = sizes.batch * sizes.heads_q * sizes.judges;
    const int pair = static_cast<int>(blockIdx.x) % pairs;
    const int first = static_cast<int>(blockIdx.x) / pairs * T::kStretch;
    const far_gather::Slot slot = params.slots[(pair + 1) * sizes.levels - 1];
    const int tile = params.judge_tiles[pair % sizes.judges];
    const int stop = sizes.near_first(tile);
    if (slot.head < 0 || first >= stop) return;  // where the last level is not offered none is
    const i64 row = static_cast<i64>(slot.head) * sizes.groups + slot.group;
    const far::Selection* selected = params.selections + row * far::kLevelsMax;
    const i32* counts = params.tile_counts + row * far::kLevelsMax * params.tile_stride + tile -
                        params.groups[slot.group].tile_first;
    // From here on levels are numbered from the last, which has the fewest landmarks.
    u32 thresholds[far::kLevelsMax];
    int all[far::kLevelsMax];  // landmarks of a level before the near field
    int offered = 0;
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        const int own = sizes.levels - 1 - level;
        const bool wanted = own >= 0 && params.slots[pair * sizes.levels + own].head >= 0;
        thresholds[level] = wanted ? static_cast<u32>(selected[own].threshold) : 256u;
        all[level] = wanted ? counts[own * params.tile_stride] : 0;
        offered += wanted;
    }

    // 1. What lies before the stretch.
    const uint4* codes = reinterpret_cast<const uint4*>(params.codes + row * sizes.code_stride);
    int own[far::kLevelsMax] = {};
    for (int i = thread; i < first / 16; i += T::kThreads) {
        const uint4 words = __ldg(codes + i);
#pragma unroll
        for (int level = 0; level < far::kLevelsMax; ++level)
            own[level] += __popc(far_gather::flags_of(words, thresholds[level]));
    }
    int before[far::kLevelsMax];
    block_sums<T>(own, before, space);

    // 2. Flags of the stretch, and where their keys stand among those that a level adds.
    const int key = first + 16 * thread;
    u32 flags[far::kLevelsMax];
    const bool inside = key < stop;
    const uint4 words = inside ? __ldg(codes + key / 16) : make_uint4(0, 0, 0, 0);
    int within[far::kLevelsMax];  // of earlier threads
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        flags[level] = inside ? far_gather::flags_of(words, thresholds[level]) : 0u;
        own[level] = __popc(flags[level]);
        int sum = own[level];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kFullWarp, sum, step);
            if (lane >= step) sum += other;
        }
        within[level] = sum - own[level];
    }
    int total[far::kLevelsMax];
    block_sums<T>(own, total, space);
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        for (int w = 0; w < warp; ++w) within[level] += space[level][w];
    }
#pragma unroll
    for (int level = 0; level < far::kLevelsMax; ++level) {
        const int fewer = level > 0 ? level - 1 : 0;
        u32 added = level > 0 ? flags[level] & ~flags[fewer] : flags[0];
        if (level >= offered) added = 0;
        int place = level > 0 ? total[fewer] + within[level] - within[fewer] : within[0];
        while (added != 0) {
            positions[place++] = key + __ffs(static_cast<int>(added)) - 1;
            added &= added - 1;
        }
        if (thread == 0) {
            starts[level] = level > 0 ? total[fewer] : 0;
            starts[level + 1] = total[level];
            places[level] = level > 0 ? all[fewer] + before[level] - before[fewer] : before[0];
        }
    }
    __syncthreads();

    // 3. Rows, level by level.
    const int batch = slot.head / sizes.heads_q;
    const int head_kv = slot.head % sizes.heads_q / (sizes.heads_q / sizes.heads_kv);
    for (int level = 0; level < offered; ++level) {
        const int start = starts[level];
        const int count = starts[level + 1] - start;
        const i64 to = static_cast<i64>(slot.row_first) + places[level];
        far_gather::copy_rows<T>(params.landmark_key + to * sizes.dim_qk, params.key, batch,
                                 head_kv, positions + start, count, sizes.dim_qk);
        far_gather::copy_rows<T>(params.landmark_value + to * sizes.dim_v, params.value, batch,
                                 head_kv, positions + start, count, sizes.dim_v);
    }
    // A tile of the forward kernel multiplies what lies behind the last landmark by 0: it must be finite.
    if (first + T::kStretch < stop) return;
    const int rows = counts[(sizes.levels - offered) * params.tile_stride];
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4* values = reinterpret_cast<uint4*>(params.landmark_value);
    const i64 pieces = sizes.dim_v / 8;
    const i64 stop_piece =
        (static_cast<i64>(slot.row_first) + round_up(rows, far::kSlotRows)) * pieces;
    for (i64 i = (static_cast<i64>(slot.row_first) + rows) * pieces + thread; i < stop_piece;
         i += T::kThreads)
        values[i] = zero;
}

}  // namespace adaattn::far_nest
