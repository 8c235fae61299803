// far_fit.cuh -- the pools' biases: a pool weighs in the sampled rows what its keys really weigh. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A warp takes 8 pools of a slot at a time: 1. s = q k^T for the group's sampled rows and the pools; 2. predicted_b =
//              sum_i 2^(c s_ib - lse_i) over the rows that see pool b as far; 3. bias_b = ln mass_b - ln predicted_b, kept within
//              ln n_b + [kBiasLeast, kBiasMost]. Source: this project, docs/design/0004.
// Numerics     q, k_b in 16 bits, s in f32; sums over rows in a fixed order.
// Tiles        m16n8k16; rows are samples, columns pools.
// Shared mem   samples: 16 bit, kSamples x (kDim + 8).
// Budget: registers<=128 spill_bytes=0 smem_bytes<=65536
// Limits       samples a multiple of 16 up to 64; dims multiples of 8 up to 256.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_fit {

constexpr float kBiasLeast = -4.0f;  // in nats, relative to ln n
constexpr float kBiasMost = 4.0f;

struct Params {
    far::Sizes sizes;
    far::Rows query;
    const far::Group* groups;
    const i32* sample_rows;
    const float* lse_log2;  // the probe's: (units, groups, columns)
    const far_gather::Slot* slots;
    const i32* pool_first;
    const u16* pool_key;
    u16* pool_value;  // its rows behind a slot's pools are made zero
    const float2* pool_mass;
    float* pool_bias;  // (rows)
    i32 chunk_heads;
    i32 splits;  // blocks that share a slot's pools
};

template <Format kFormatT, int kDimT, int kSamplesT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDim = kDimT;  // dim_qk padded to a multiple of 64
    static constexpr int kSamples = kSamplesT;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpThreads;
    static constexpr int kRowBytes = kDim * 2 + 16;
    static constexpr int kSmemBytes = kSamples * kRowBytes + 8 * kSamples;
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    extern __shared__ __align__(128) char shared[];
    const far::Sizes& sizes = params.sizes;
    const int index = static_cast<int>(blockIdx.x) / params.splits;
    const int split = static_cast<int>(blockIdx.x) % params.splits;
    const far_gather::Slot slot = params.slots[index];
    if (slot.head < 0) return;
    const int pools = params.groups[slot.group].far_keys / far::kPoolKeys;
    if (split == 0) {
        // A tile of the forward kernel multiplies what lies behind the last pool by 0: it must be finite.
        uint4* values = reinterpret_cast<uint4*>(params.pool_value);
        const i64 pieces = sizes.dim_v / 8;
        const i64 row = params.pool_first[index];
        for (i64 i = (row + pools) * pieces + threadIdx.x;
             i < (row + round_up(pools, far::kSlotRows)) * pieces; i += T::kThreads) {
            values[i] = make_uint4(0, 0, 0, 0);
        }
    }
    if (split * 8 * T::kWarps >= pools) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int* rows = params.sample_rows + slot.group * T::kSamples;
    const int columns = params.chunk_heads * T::kSamples;
    const float* lse =
        params.lse_log2 +
        (static_cast<i64>(slot.head / params.chunk_heads) * sizes.groups + slot.group) * columns +
        slot.head % params.chunk_heads * T::kSamples;
    float* shift = reinterpret_cast<float*>(shared + T::kSamples * T::kRowBytes);
    int* far_pools = reinterpret_cast<int*>(shift + T::kSamples);  // pools that a row sees as far
    for (int i = static_cast<int>(threadIdx.x); i < T::kSamples * (T::kDim / 8); i += T::kThreads) {
        const int row = i / (T::kDim / 8);
        const int piece = i % (T::kDim / 8);
        uint4 words = make_uint4(0, 0, 0, 0);
        if (8 * piece < sizes.dim_qk) {
            words = __ldg(reinterpret_cast<const uint4*>(params.query.at(
                              slot.head / sizes.heads_q, slot.head % sizes.heads_q, rows[row])) +
                          piece);
        }
        *reinterpret_cast<uint4*>(shared + row * T::kRowBytes + 16 * piece) = words;
    }
    for (int i = static_cast<int>(threadIdx.x); i < T::kSamples; i += T::kThreads) {
        shift[i] = lse[i];
        far_pools[i] = sizes.near_first(rows[i] / sizes.tile) / far::kPoolKeys;
    }
    __syncthreads();
    const u32 samples = static_cast<u32>(__cvta_generic_to_shared(shared));
    for (int first = (split * T::kWarps + warp) * 8; first < pools;
         first += params.splits * T::kWarps * 8) {
        // B: pools as columns, dims down; a lane holds dims 2 (lane % 4) + {0, 1} (+ 8) of pool lane / 4.
        const i64 place =
            static_cast<i64>(params.pool_first[index]) + smaller(first + lane / 4, pools - 1);
        const u16* key = params.pool_key + place * sizes.dim_qk + 2 * (lane % 4);
        u32 b[T::kDim / 8];
#pragma unroll
        for (int k = 0; k < T::kDim / 8; ++k)
            b[k] = 8 * k < sizes.dim_qk ? *reinterpret_cast<const u32*>(key + 8 * k) : 0u;
        float predicted[2] = {0.0f, 0.0f};
#pragma unroll
        for (int m = 0; m < T::kSamples / 16; ++m) {
            float scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < T::kDim / 16; ++k) {
                u32 a[4];
                ptx::load_matrices(
                    a, samples + (16 * m + lane % 16) * T::kRowBytes + 32 * k + 16 * (lane / 16));
                if constexpr (T::kFormat == Format::bf16) {
                    ptx::mma_bf16(scores, a, b[2 * k], b[2 * k + 1]);
                } else {
                    ptx::mma_f16(scores, a, b[2 * k], b[2 * k + 1]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * m + lane / 4 + 8 * r;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int pool = first + 2 * (lane % 4) + e;
                    const float x =
                        fminf(fmaf(scores[2 * r + e], sizes.scale_log2, -shift[row]), 40.0f);
                    predicted[e] += pool < far_pools[row] ? ptx::exp2_approx(x) : 0.0f;
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2)
                predicted[e] += __shfl_xor_sync(kFullWarp, predicted[e], step);
            const int pool = first + 2 * lane + e;
            if (lane < 4 && pool < pools) {
                const i64 own = static_cast<i64>(params.pool_first[index]) + pool;
                const float2 mass = params.pool_mass[own];
                float bias = mass.y;
                if (predicted[e] > 0.0f && mass.x > -60.0f) {
                    bias = fminf(fmaxf(mass.x - logf(predicted[e]), mass.y + kBiasLeast),
                                 mass.y + kBiasMost);
                }
                params.pool_bias[own] = bias;
            }
        }
    }
}

}  // namespace adaattn::far_fit
