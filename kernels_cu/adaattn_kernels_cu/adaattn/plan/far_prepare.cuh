// far_prepare.cuh -- what an adaptive call needs before anything else: the certificate's query rows side by side, and the norms that
// bound what exact rows may themselves err by. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    The first blocks copy the drawn query rows of every head to a compact array; the others take stretches of
//              values, then of keys, then of queries where all of these count. The norm of every row, scaled where its square would under- or overflow, goes to a maximum per head by
//              atomicMax on the bits.
// Numerics     Norms in f32, rounded up by 2^-20; NaN counts as the largest. Zero rows make every warp of theirs go twice.
// Tiles        256 threads, a warp a row.
// Shared mem   none.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=1024
// Limits       dims multiples of 8; rows start on 16 bytes. norms are 0 before the launch.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_prepare {

struct Params {
    far::Sizes sizes;
    far::Rows query;
    far::Rows arrays[2];    // value, key
    const i32* drawn_rows;  // (batch, heads_q, drawn)
    u16* drawn_query;       // (batch, heads_q, drawn, dim_qk)
    u32* norms;             // (2, batch, heads_kv): bits of the largest |v| and |k|
    u32* query_norms;       // (batch, heads_q): of the drawn rows, or of all
    i32 drawn;
    i32 copy_blocks;  // blocks that copy; the rest measure
    i32 stretches;    // measuring blocks of one head
    i32 stretch_rows;
    i32 queries;  // 1: all queries are measured, too
    i32 padding;
};

template <Format kFormatT, int kDimT, int kThreadsT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDim = kDimT;          // the larger of both, padded to 64, 128 or 256
    static constexpr int kRowLanes = kDim / 8;  // lanes that hold a row
    static constexpr int kWarpRows = kWarpThreads / kRowLanes;
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

// Norm of a row, alike in the lanes that hold it, eight elements each. NaN and Inf stay.
template <class T>
ADAATTN_DEVICE float norm_of(const uint4& words) {
    const u32 all[4] = {words.x, words.y, words.z, words.w};
    float own[8];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        own[i] = quant::widen<T::kFormat>(static_cast<u16>(all[i / 2] >> (16 * (i % 2)) & 0xffffu));
        sum = fmaf(own[i], own[i], sum);
    }
#pragma unroll
    for (int step = T::kRowLanes / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, step);
    constexpr float kRoundUp = 1.0f + 9.5367432e-7f;
    if (!__any_sync(kFullWarp, !(sum > 1e-30f && sum < 1e30f))) return sqrtf(sum) * kRoundUp;
    // Squares under- or overflow: once more, scaled by the largest element.
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fabsf(own[i]) > top || own[i] != own[i] ? fabsf(own[i]) : top;
#pragma unroll
    for (int step = T::kRowLanes / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kFullWarp, top, step);
        top = other > top || other != other ? other : top;
    }
    const bool scalable = top > 0.0f && top < ptx::infinity();
    const float largest = fmaxf(top, 1e-37f);
    const float inverse = scalable ? 1.0f / largest : 0.0f;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(own[i] * inverse, own[i] * inverse, sum);
#pragma unroll
    for (int step = T::kRowLanes / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(kFullWarp, sum, step);
    return scalable ? largest * sqrtf(sum) * kRoundUp : top;
}

// Bits of non-negative floats are ordered as the floats are; a positive NaN lies above infinity.
ADAATTN_DEVICE void raise(u32* to, float norm) {
    atomicMax(to, static_cast<u32>(__float_as_int(fabsf(norm))));
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const far::Sizes& sizes = params.sizes;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int block = static_cast<int>(blockIdx.x);
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    const int piece = lane % T::kRowLanes;
    const int own_row = warp * T::kWarpRows + lane / T::kRowLanes;
    constexpr int kBlockRows = T::kWarps * T::kWarpRows;
    if (block < params.copy_blocks) {
        const int rows = sizes.batch * sizes.heads_q * params.drawn;
        for (int first = block * kBlockRows; first < rows;
             first += params.copy_blocks * kBlockRows) {
            const int i = first + own_row;
            const bool valid = i < rows && 8 * piece < sizes.dim_qk;
            const int head = smaller(i, rows - 1) / params.drawn;
            uint4 words = nothing;
            if (valid) {
                const u16* from = params.query.at(head / sizes.heads_q, head % sizes.heads_q,
                                                  params.drawn_rows[i]);
                words = __ldg(reinterpret_cast<const uint4*>(from) + piece);
                reinterpret_cast<uint4*>(params.drawn_query +
                                         static_cast<i64>(i) * sizes.dim_qk)[piece] = words;
            }
            const float norm = norm_of<T>(words);
            if (i < rows && piece == 0) raise(params.query_norms + head, norm);
        }
        return;
    }
    const int heads = sizes.batch * sizes.heads_kv;
    const int unit = (block - params.copy_blocks) / params.stretches;
    const bool of_query = unit >= 2 * heads;
    const int head = of_query ? unit - 2 * heads : unit % heads;
    const int heads_each = of_query ? sizes.heads_q : sizes.heads_kv;
    const far::Rows& array = of_query ? params.query : params.arrays[unit / heads];
    const int dim = unit < heads ? sizes.dim_v : sizes.dim_qk;
    const int first = (block - params.copy_blocks) % params.stretches * params.stretch_rows;
    const int stop = smaller(first + params.stretch_rows, of_query ? sizes.len_q : sizes.len_kv);
    float largest = 0.0f;
    constexpr int kAhead = 4;  // rows in flight a thread
    for (int row = first; row < stop; row += kAhead * kBlockRows) {
        uint4 words[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int own = row + i * kBlockRows + own_row;
            words[i] = nothing;
            if (own < stop && 8 * piece < dim) {
                words[i] = __ldg(reinterpret_cast<const uint4*>(
                                     array.at(head / heads_each, head % heads_each, own)) +
                                 piece);
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const float norm = norm_of<T>(words[i]);
            largest = norm > largest || norm != norm ? norm : largest;
        }
    }
#pragma unroll
    for (int step = 16; step >= T::kRowLanes; step /= 2) {
        const float other = __shfl_xor_sync(kFullWarp, largest, step);
        largest = other > largest || other != other ? other : largest;
    }
    if (lane == 0) raise(of_query ? params.query_norms + head : params.norms + unit, largest);
}

}  // namespace adaattn::far_prepare
