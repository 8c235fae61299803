// sm90_probe_merge.cuh -- the probe's log-sum-exp from its parts: lanes, warps, splits.
// SPDX-License-Identifier: Apache-2.0
//
// T is the probe's Traits, Block its state. A part is a reference c r and the sum of 2^(c s - c r);
// with statistics also the sum of 2^(c s - c r) c s.
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/plan/far_field.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::sm90_probe {

// Merges (reference, sum) pairs in units of 2: the reference is the larger, the sum follows it.
ADAATTN_DEVICE void merge(float& reference, float& sum, float& weighted, float other,
                          float other_sum, float other_weighted) {
    const float next = fmaxf(reference, other);
    const float mine = reference == next ? 1.0f : ptx::exp2_approx(reference - next);
    const float theirs = other == next ? 1.0f : ptx::exp2_approx(other - next);
    sum = sum * mine + other_sum * theirs;
    weighted = weighted * mine + other_weighted * theirs;
    reference = next;
}

// Number of splits of this group that have keys.
template <class Block>
ADAATTN_DEVICE int live_splits(const Block& block) {
    const far::Sizes& sizes = block.params.sizes;
    const far::Group& own = block.params.groups[block.group];
    const int last_row = smaller((own.tile_first + own.tiles) * sizes.tile, sizes.len_q) - 1;
    return ceil_div(sizes.visible(last_row), sizes.split_keys);
}

// After run_lse: one thread a column.
template <class T, class Block>
ADAATTN_DEVICE void write_partials(const Block& block) {
    const int column = static_cast<int>(threadIdx.x);
    if (column < T::kColumns) {
        float reference = -ptx::infinity();
        float sum = 0.0f;
        float weighted = 0.0f;
        if (block.tiles > 0) {
            for (int warp = 0; warp < T::kConsumerWarps; ++warp) {
                const float* own =
                    block.merge_space() + (warp * T::kColumns + column) * T::kMergeFloats;
                merge(reference, sum, weighted, own[0], own[1], T::kStats ? own[2] : 0.0f);
            }
        }
        const i64 place =
            (block.group_index() * block.params.sizes.splits + block.split) * T::kColumns + column;
        block.params.partial[place] = make_float2(reference, sum);
        if constexpr (T::kStats) block.params.partial_weighted[place] = weighted;
    }
}

// The block that finishes last merges all splits of the group, always in the same order.
template <class T, class Block>
ADAATTN_DEVICE void merge_splits(const Block& block) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    const int live = live_splits(block);
    if (threadIdx.x == 0)
        last = atomicAdd(block.params.finished + block.group_index(), 1) == live - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int column = static_cast<int>(threadIdx.x);
    if (column < T::kColumns) {
        float reference = -ptx::infinity();
        float sum = 0.0f;
        float weighted = 0.0f;
        for (int s = 0; s < live; ++s) {
            const i64 place =
                (block.group_index() * block.params.sizes.splits + s) * T::kColumns + column;
            const float2 part = __ldcg(block.params.partial + place);
            merge(reference, sum, weighted, part.x, part.y,
                  T::kStats ? __ldcg(block.params.partial_weighted + place) : 0.0f);
        }
        const float lse = sum > 0.0f ? reference + log2f(sum) : -ptx::infinity();
        const i64 place = block.group_index() * T::kColumns + column;
        block.params.lse_log2[place] = lse;
        if constexpr (T::kStats) {
            const float entropy = sum > 0.0f ? lse - weighted / sum : 0.0f;
            block.params.stats[place] =
                make_float4(entropy, exp2f(reference - lse), reference, 0.0f);
        }
    }
    if (threadIdx.x == 0) block.params.finished[block.group_index()] = 0;
}

}  // namespace adaattn::sm90_probe
