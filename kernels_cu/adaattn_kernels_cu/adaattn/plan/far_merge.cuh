// far_merge.cuh -- joins the splits of exactly computed rows. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A warp a row: o = sum_s e^(l_s - l) o_s, e^l = sum_s e^(l_s), over the splits that hold a key the row sees.
// Numerics     f32, splits in order.
// Tiles        8 warps.
// Shared mem   none.
// Budget: registers<=96 spill_bytes=0 smem_bytes<=1024
// Limits       dim_v up to 256.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::far_merge {

struct Params {
    const float* partial_out;  // (partials, 128, dim_v)
    const float* partial_lse;  // (partials, 128)
    const i32* first_partial;  // (tiles + 1): of the splits of a tile of rows
    float* exact;              // (tiles, 128, dim_v)
    i32 tiles;
    i32 dim_v;
};

template <int kWarpsT>
struct Traits {
    static constexpr int kWarps = kWarpsT;
    static constexpr int kThreads = kWarps * kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    constexpr int kTile = 128;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int index =
        static_cast<int>(blockIdx.x) * T::kWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
    if (index >= params.tiles * kTile) return;
    const int tile = index / kTile;
    const int row = index % kTile;
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
        if (lane + 32 * i < params.dim_v)
            params.exact[static_cast<i64>(index) * params.dim_v + lane + 32 * i] =
                exact[i] * inverse;
    }
}

}  // namespace adaattn::far_merge
