// smxx_attn_bwd_finish.cuh -- the queries' gradient from the f32 sums that a backward kernel left.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    dq = scale x sum, rounded. A sum that is not finite sets `broken`.
// Numerics     f32 product, one rounding to 16 bits.
// Tiles        One thread to eight columns.
// Shared mem   None.
// Registers    Few.
// Barriers     None.
// Limits       dim a multiple of 8 up to kDim; sums as sm90_bwd_params.cuh lays them out.
// Ladder       One pass: bandwidth-bound.
//
// Budget: registers<=64 spill_bytes=0 smem_bytes<=0
#pragma once

#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_attn_bwd_finish {

struct Params {
    const float* sums;  // (heads, 2, len, kDim / 2), chunks of four columns at number ^ (row % 8)
    void* out;          // (heads, len, dim), contiguous
    u32* broken;
    i64 rows;  // heads x len
    i32 len, dim;
    float scale;
    i32 reserved;
};

template <Format kFormatT, int kDimT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDim = kDimT;
    static constexpr int kThreads = 256, kSmemBytes = 0;
    static constexpr int kRows = kThreads / (kDim / 8);  // of one block
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    constexpr int kHalf = T::kDim / 2, kPerRow = T::kDim / 8;
    const i64 place =
        static_cast<i64>(ptx::block_index()) * T::kRows + ptx::thread_index() / kPerRow;
    const int column = 8 * (ptx::thread_index() % kPerRow);
    if (place >= params.rows || column >= params.dim) return;
    const i64 head = place / params.len;
    const int row = static_cast<int>(place - head * params.len);
    const int half = column / kHalf, chunk = column % kHalf / 4;
    const float* from = params.sums + ((2 * head + half) * params.len + row) * kHalf;
    float poison = 0.0f;
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 x[4];
        ptx::load_global_128(x, from + 4 * ((chunk + i) ^ (row & 7)));
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const float low = ptx::bits_float(x[e]) * params.scale;
            const float high = ptx::bits_float(x[e + 1]) * params.scale;
            poison = ptx::fma_rn(low, 0.0f, ptx::fma_rn(high, 0.0f, poison));
            words[2 * i + e / 2] = quant::pack_pair<T::kFormat>(low, high);
        }
    }
    u16* to = static_cast<u16*>(params.out) + place * params.dim + column;
    ptx::store_global_64(to, words[0], words[1]);
    ptx::store_global_64(to + 4, words[2], words[3]);
    if (!(poison == 0.0f)) *params.broken = 1;
}

}  // namespace adaattn::smxx_attn_bwd_finish
