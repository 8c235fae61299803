// far_merge.cuh -- joins the splits of exactly computed rows; the last tile's are an output as they are. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A warp a row: o = sum_s e^(l_s - l) o_s, e^l = sum_s e^(l_s), over the splits that hold a key the row sees. The rows
//              from `tail_first` on, a head's first tile here, go to out and lse as well, and their sums of squares to the
//              certificate's: no head computes them again but those that are exact, which comes later.
// Numerics     f32, splits in order; out rounded to 16 bits.
// Tiles        16 warps: sixteen rows, as sums of squares are kept.
// Shared mem   sums of squares: f32, 16.
// Budget: registers<=96 spill_bytes=0 smem_bytes<=1024
// Limits       dim_v up to 256.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_merge {

struct Params {
    const float* partial_out;  // (partials, 128, dim_v)
    const float* partial_lse;  // (partials, 128)
    const i32* first_partial;  // (tiles + 1): of the splits of a tile of rows
    float* exact;              // (tiles, 128, dim_v)
    far::Rows out;
    far::Rows lse;      // f32, in units of its elements
    float* squares;     // (batch, heads_q, square_stride): sums of squares of 16 rows each
    const i32* failed;  // (batch, heads_q): heads of 0 are passed over; null: none is
    i32 tiles;
    i32 dim_v;
    i32 head_tiles;  // of a head: consecutive
    i32 heads_q;
    i32 len_q;
    i32 tail_first;  // first row of a head's first tile here; below 0: no output is made of it
    i32 square_stride;
    i32 padding;
};

template <Format kFormatT, int kWarpsT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kWarps = kWarpsT;
    static constexpr int kThreads = kWarps * kWarpThreads;
    static constexpr int kSmemBytes = 0;
    static_assert(kWarps == 16, "a block makes one sum of squares");
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float squares[T::kWarps];
    constexpr int kTile = 128;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int index = static_cast<int>(blockIdx.x) * T::kWarps + warp;
    const int tile = index / kTile;
    const int row = index % kTile;
    if (params.failed != nullptr && params.failed[tile / params.head_tiles] == 0) return;
    const int first = params.first_partial[tile];
    const int stop = params.first_partial[tile + 1];
    float top = -ptx::infinity();
    for (int s = first + lane; s < stop; s += kWarpThreads)
        top = fmaxf(top, params.partial_lse[static_cast<i64>(s) * kTile + row]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    float total = 0.0f;
    float exact[8] = {};
#pragma unroll 8
    for (int s = first; s < stop; ++s) {
        const float lse = params.partial_lse[static_cast<i64>(s) * kTile + row];
        const bool seen = lse != -ptx::infinity();  // NaN counts
        const float weight = seen ? expf(lse - top) : 0.0f;
        total += weight;
        const float* part = params.partial_out + (static_cast<i64>(s) * kTile + row) * params.dim_v;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (seen && lane + 32 * i < params.dim_v)
                exact[i] = fmaf(weight, part[lane + 32 * i], exact[i]);
        }
    }
    const float inverse = 1.0f / total;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        exact[i] *= inverse;
        if (lane + 32 * i < params.dim_v)
            params.exact[static_cast<i64>(index) * params.dim_v + lane + 32 * i] = exact[i];
    }
    if (params.tail_first < 0 || tile % params.head_tiles != 0) return;
    const int head = tile / params.head_tiles;
    const int own = params.tail_first + row;
    float sum = 0.0f;
    if (own < params.len_q) {
        u16* out =
            const_cast<u16*>(params.out.at(head / params.heads_q, head % params.heads_q, own));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (lane + 32 * i < params.dim_v) {
                out[lane + 32 * i] = quant::narrow<T::kFormat>(exact[i]);
                sum = fmaf(exact[i], exact[i], sum);
            }
        }
        if (lane == 0) {
            float* lse = static_cast<float*>(const_cast<void*>(params.lse.data));
            lse[head / params.heads_q * params.lse.stride_batch +
                head % params.heads_q * params.lse.stride_head + own * params.lse.stride_row] =
                top + logf(total);
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (lane == 0) squares[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float all = 0.0f;
    for (int w = 0; w < T::kWarps; ++w) all += squares[w];
    const int place = (params.tail_first + row) / 16;
    if (params.tail_first + row < params.len_q)
        params.squares[static_cast<i64>(head) * params.square_stride + place] = all;
}

}  // namespace adaattn::far_merge
