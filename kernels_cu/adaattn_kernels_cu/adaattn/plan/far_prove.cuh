// far_prove.cuh -- certifies exact heads by theorem, as far as theorems suffice, so that no row need be drawn for them.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per head. 1. The rms of all returned rows, from the sums of squares that the forward kernel left.
//              2. upper = (|v| (value_factor + score_factor |q| |k|) + lost) / rms: theorem 8 for a dense head, whose factors the
//              host takes from adaattn_core (planner/drawing.py); |v|, |k| and |q| are the largest of all rows.
//              3. failed = upper above the budget; then the head's items of drawn rows go to the list of those that are computed.
//              Source: this project, docs/math/08-composition.md.
// Numerics     f32, rounded up by 2^-15; NaN counts as infinite, and so do norms beyond kMostNorm, which the factors do not cover.
// Tiles        512 threads.
// Shared mem   a float a warp.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=1024
// Limits       none.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_certify.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::far_prove {

constexpr float kMostNorm = 1e12f;

struct Params {
    far::Sizes sizes;
    const float* squares;    // (batch, heads_q, square_stride): of 16 returned rows each
    const u32* norms;        // (2, batch, heads_kv): bits of the largest |v| and |k|
    const u32* query_norms;  // (batch, heads_q): of the largest |q|
    i32* failed;             // (batch, heads_q)
    far_certify::Verdict* verdicts;
    const work::WorkItem* items;  // of drawn rows, head by head
    const i32* first_item;        // (tiles of drawn rows + 1): of each tile's
    work::WorkItem* asked;        // the list of heads that failed; ends with items of no rows
    work::Queue* queue;           // of that list; 0 before
    float budget;
    float value_factor;
    float score_factor;
    float lost;  // what underflow may cost a row
    i32 square_stride;
    i32 head_tiles;  // tiles of drawn rows of a head: consecutive
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

// The sentence about a head whose returned rows have this sum of squares; whether it misses the budget. One thread.
ADAATTN_DEVICE bool judge(const Params& params, int head, float squares) {
    const far::Sizes& sizes = params.sizes;
    // The sums are of rows before they were rounded to 16 bits: 2^-8 at most.
    const float rms = sqrtf(squares / static_cast<float>(sizes.len_q)) * (1.0f - 3.90625e-3f);
    const int key_head = head / sizes.heads_q * sizes.heads_kv +
                         head % sizes.heads_q / (sizes.heads_q / sizes.heads_kv);
    const int key_heads = sizes.batch * sizes.heads_kv;
    const float value_norm = __int_as_float(static_cast<int>(params.norms[key_head]));
    const float key_norm = __int_as_float(static_cast<int>(params.norms[key_heads + key_head]));
    const float query_norm = __int_as_float(static_cast<int>(params.query_norms[head]));
    const bool covered =
        value_norm <= kMostNorm && key_norm <= kMostNorm && query_norm <= kMostNorm;
    const float factor = fmaf(params.score_factor, query_norm * key_norm, params.value_factor);
    const float reached = fmaf(value_norm, factor, params.lost) * (1.0f + 3.0517578e-5f);
    float upper = value_norm == 0.0f ? 0.0f : reached / rms;
    const bool nonfinite = !(squares < ptx::infinity());
    if (nonfinite || !covered || !(upper == upper)) upper = ptx::infinity();
    far_certify::Verdict verdict = {};
    verdict.upper = verdict.first_upper = upper;
    verdict.estimate = __int_as_float(0x7fc00000);  // nothing was drawn
    verdict.rms = rms;
    verdict.rounds = 1;
    verdict.nonfinite = nonfinite;
    verdict.proved = 1;
    params.verdicts[head] = verdict;
    return !(upper <= params.budget);
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float space[T::kWarps];
    __shared__ int place;  // in the list; below 0: the head is proved
    const far::Sizes& sizes = params.sizes;
    const int head = static_cast<int>(blockIdx.x);
    float squares = 0.0f;
    const float* own = params.squares + static_cast<i64>(head) * params.square_stride;
    for (int i = static_cast<int>(threadIdx.x); i < ceil_div(sizes.len_q, 16); i += T::kThreads)
        squares += own[i];
    squares = far_certify::block_sum<T>(squares, space);
    const int first = params.first_item[head * params.head_tiles];
    const int count = params.first_item[(head + 1) * params.head_tiles] - first;
    if (threadIdx.x == 0) {
        const bool failed = judge(params, head, squares);
        params.failed[head] = failed;
        place = failed ? atomicAdd(&params.queue->items, count) : -1;
    }
    __syncthreads();
    if (place < 0) return;
    const uint4* from = reinterpret_cast<const uint4*>(params.items + first);
    uint4* to = reinterpret_cast<uint4*>(params.asked + place);
    constexpr int kPieces = sizeof(work::WorkItem) / sizeof(uint4);
    for (int i = static_cast<int>(threadIdx.x); i < count * kPieces; i += T::kThreads)
        to[i] = from[i];
}

}  // namespace adaattn::far_prove
