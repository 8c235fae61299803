// sm90_bwd_epilogue.cuh -- gradients of a warp's 16 keys, from accumulators to global memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/sm90_bwd_producer.cuh"
#include "adaattn/attn/sm90_epilogue.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

// Multiplies by `factor`, rounds and writes; accumulators as wgmma leaves them. `row` is the first
// of the warp's 16 keys within the tile.
template <Format kFormat, int kDim>
ADAATTN_DEVICE void write_gradient(const Params& params, void* array, int dim, const KeyWork& work,
                                   const float (&acc)[kDim / 2], float factor, int row, int lane) {
    const i64 head = static_cast<i64>(work.item.batch) * params.heads_kv + work.item.head;
    bool broken = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int own_row = row + lane / 4 + 8 * r;
        const bool exists = own_row < work.item.rows;
        u16* to =
            static_cast<u16*>(array) + (head * params.len_kv + work.item.row_first + own_row) * dim;
        float poison = 0.0f;  // NaN as soon as one factor is NaN or Inf
#pragma unroll
        for (int block = 0; block < kDim / 8; block += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = acc[4 * (block + i) + 2 * r] * factor;
                const float high = acc[4 * (block + i) + 2 * r + 1] * factor;
                poison = fmaf(low, 0.0f, fmaf(high, 0.0f, poison));
                words[i] = quant::pack_pair<kFormat>(low, high);
            }
            transpose_quad(words, lane);
            const int column = 8 * (block + lane % 4);
            if (exists && column < dim) {
                *reinterpret_cast<uint4*>(to + column) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        broken |= exists && !(poison == 0.0f);
    }
    if (__any_sync(kFullWarp, broken) && lane == 0) *params.broken = 1;
}

}  // namespace adaattn::sm90_attn_bwd_f16
