// quantize_tile.cuh -- 128 rows of one head to codes and scales.
// SPDX-License-Identifier: Apache-2.0
//
// The work of one block of smxx_quantize.cuh, which says what is computed; T is its Traits.
#pragma once

#include "adaattn/ptx/sm80.cuh"
#include "adaattn/ptx/sm89.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/quant/quantize_params.cuh"
#include "adaattn/quant/scale_tile.cuh"

namespace adaattn::smxx_quantize {

ADAATTN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

ADAATTN_DEVICE bool finite(u32 bits) { return (bits & 0x7fffffffu) < 0x7f800000u; }
ADAATTN_DEVICE u32 magnitude(float x) { return ptx::float_bits(x) & 0x7fffffffu; }

// Eight elements of a row; zeros where `count` says that there are none.
template <Format kInput>
ADAATTN_DEVICE uint4 load_chunk(const void* data, i64 index, bool exists) {
    if (!exists) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const u16*>(data) + index));
}

template <Format kInput>
ADAATTN_DEVICE void widen_chunk(float (&x)[8], uint4 packed) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] = quant::widen<kInput>(static_cast<u16>(words[i / 2] >> (16 * (i % 2))));
    }
}

// A step and its reciprocal for a group whose largest magnitude has these bits.
struct Step {
    float size;
    float inverse;
};
ADAATTN_DEVICE Step step_of(u32 largest, float limit) {
    const float amax = fmaxf(ptx::bits_float(largest), kTiny);
    return {__fmul_rn(amax, __fdiv_rn(1.0f, limit)), __fdiv_rn(limit, amax)};
}

ADAATTN_DEVICE u32 pack_i8(const float* x, float inverse) {
    u32 packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int code = __float2int_rn(__fmul_rn(x[i], inverse));
        packed |= (static_cast<u32>(code) & 0xffu) << (8 * i);
    }
    return packed;
}

// The chunk of a head's centre.
ADAATTN_DEVICE void load_centre(float (&c)[8], const float* centre, int chunk) {
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = __ldg(centre + 8 * chunk + i);
}

template <class T>
ADAATTN_DEVICE void quantise_keys(const Params& params, const Tile& tile, int head) {
    __shared__ u32 halves[2][16];
    constexpr int kChunks = T::kDimQk / 8;
    constexpr int kStride = T::kThreads / kChunks;  // rows of one pass
    constexpr int kPasses = kTileKeys / kStride;
    const int chunk = thread() % kChunks;
    const int first = thread() / kChunks;
    const bool in_dim = 8 * chunk < params.dim_qk;
    const i64 base = tile.batch * params.key.batch + head * params.key.head + 8 * chunk;
    uint4 packed[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = first + i * kStride;
        packed[i] = load_chunk<T::kInput>(
            params.key.data, base + (static_cast<i64>(tile.first) + row) * params.key.row,
            in_dim && row >= tile.begin && row < tile.end);
    }
    float c[8];
    load_centre(c,
                params.centres + (static_cast<i64>(tile.span) * params.heads_kv + head) * T::kDimQk,
                chunk);
    float x[kPasses][8];
    u32 largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = first + i * kStride;
        const bool counts = row >= tile.begin && row < tile.end;
        widen_chunk<T::kInput>(x[i], packed[i]);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            x[i][e] = counts ? __fsub_rn(x[i][e], c[e]) : 0.0f;
            u32& most = largest[2 * i / kPasses];
            const u32 size = magnitude(x[i][e]);
            most = size > most ? size : most;
        }
    }
    // A half-warp's rows are all of one group.
    const int half = thread() / 16;
    const u32 lanes = 0xffffu << (thread() & 16);
#pragma unroll
    for (int span = 0; span < 2; ++span) {
        const u32 most = __reduce_max_sync(lanes, largest[span]);
        if (thread() % 16 == 0) halves[span][half] = most;
    }
    __syncthreads();  // all threads: maxima are written before they are read
    // Group of row r: r % 8 / 2. Half-warp h holds row h of every sixteen, or rows 2 h and 2 h + 1
    // of every thirty-two.
    static_assert(kStride % 8 == 0, "a thread's rows are all of one group");
    const int group = first % 8 / 2;
    Step steps[2];
#pragma unroll
    for (int span = 0; span < 2; ++span) {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 other =
                halves[span][kChunks == 16 ? 2 * group + i % 2 + 8 * (i / 2) : group + 4 * i];
            most = other > most ? other : most;
        }
        steps[span] = step_of(most, kKeyLimit);
        if (!finite(most)) steps[span] = {ptx::not_a_number(), 0.0f};
        if (thread() % kChunks == 0 && first < 8 && first % 2 == 0) {
            params.tile_scales[tile_scale_index(params.heads_kv, params.rows_kv, tile.batch, head,
                                                tile.place) +
                               4 * span + group] = steps[span].size;
        }
    }
    u32* codes =
        params.key_codes +
        ((static_cast<i64>(tile.batch) * params.heads_kv + head) * params.rows_kv + tile.place) *
            (T::kDimQk / 4);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const float inverse = steps[2 * i / kPasses].inverse;
        if (inverse == 0.0f) {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[i][e] = 0.0f;
        }
        *reinterpret_cast<uint2*>(codes + (first + i * kStride) * (T::kDimQk / 4) + 2 * chunk) =
            make_uint2(pack_i8(x[i], inverse), pack_i8(x[i] + 4, inverse));
    }
}

template <class T>
ADAATTN_DEVICE void quantise_values(const Params& params, const Tile& tile, int head) {
    __shared__ u32 warps[T::kThreads / kWarpThreads];
    __shared__ u32 transposed[T::kDimV][kTileKeys / 4 + 1];
    constexpr int kChunks = T::kDimV / 8;
    constexpr int kStride = T::kThreads / kChunks;  // quads of keys of one pass
    constexpr int kPasses = kTileKeys / 4 / kStride;
    const int chunk = thread() % kChunks;
    const int first = thread() / kChunks;
    const bool in_dim = 8 * chunk < params.dim_v;
    const i64 base = tile.batch * params.value.batch + head * params.value.head + 8 * chunk;
    // Quad q holds the four keys that lie side by side in the operand: of group q / 4 of sixteen,
    // those of lane t = q % 4 of a score fragment: 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
    uint4 packed[kPasses][4];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int quad = first + i * kStride;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int row = 16 * (quad / 4) + 2 * (quad % 4) + 8 * (k / 2) + k % 2;
            packed[i][k] = load_chunk<T::kInput>(
                params.value.data, base + (static_cast<i64>(tile.first) + row) * params.value.row,
                in_dim && row >= tile.begin && row < tile.end);
        }
    }
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float x[8];
            widen_chunk<T::kInput>(x, packed[i][k]);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const u32 size = magnitude(x[e]);
                if (finite(size) && size > largest) largest = size;
            }
        }
    }
    largest = __reduce_max_sync(kFullWarp, largest);
    if (thread() % kWarpThreads == 0) warps[thread() / kWarpThreads] = largest;
    __syncthreads();  // all threads: maxima are written before they are read
#pragma unroll
    for (int i = 0; i < T::kThreads / kWarpThreads; ++i) {
        largest = warps[i] > largest ? warps[i] : largest;
    }
    const Step step = step_of(largest, kValueLimit);
    if (thread() == 0) {
        params.tile_scales[tile_scale_index(params.heads_kv, params.rows_kv, tile.batch, head,
                                            tile.place) +
                           kValueScale] = step.size;
    }
    // Word q of a channel stands at q + rotation, so that the lanes of a warp meet all banks.
    const int rotation = 2 * (chunk / 4);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        float x[4][8];
#pragma unroll
        for (int k = 0; k < 4; ++k) widen_chunk<T::kInput>(x[k], packed[i][k]);
        const int word = (first + i * kStride + rotation) % (kTileKeys / 4);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float scaled[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                // What is not finite is NaN: saturation would make a number of it.
                scaled[k] = finite(ptx::float_bits(x[k][e])) ? __fmul_rn(x[k][e], step.inverse)
                                                             : ptx::not_a_number();
            }
            transposed[8 * chunk + e][word] =
                ptx::pack_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]);
        }
    }
    __syncthreads();  // all threads: codes are written before they are read
    const i64 head_row = (static_cast<i64>(tile.batch) * params.heads_kv + head) * T::kDimV;
#pragma unroll
    for (int i = 0; i < T::kDimV * 8 / T::kThreads; ++i) {
        const int channel = (thread() + i * T::kThreads) / 8;
        const int part = thread() % 8;
        const int turn = 2 * (channel / 32);
        const u32* words = transposed[channel];
        uint4 out;
        out.x = words[(4 * part + turn) % 32];
        out.y = words[(4 * part + turn + 1) % 32];
        out.z = words[(4 * part + turn + 2) % 32];
        out.w = words[(4 * part + turn + 3) % 32];
        *reinterpret_cast<uint4*>(params.value_codes +
                                  ((head_row + channel) * params.rows_kv + tile.place) / 4 +
                                  4 * part) = out;
    }
}

template <class T>
ADAATTN_DEVICE void quantise_queries(const Params& params, const Tile& tile, int head) {
    constexpr int kChunks = T::kDimQk / 8;
    constexpr int kStride = T::kThreads / kChunks;
    constexpr int kPasses = kTileKeys / kStride;
    const int chunk = thread() % kChunks;
    const int first = thread() / kChunks;
    const bool in_dim = 8 * chunk < params.dim_qk;
    const i64 base = tile.batch * params.query.batch + head * params.query.head + 8 * chunk;
    uint4 packed[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = first + i * kStride;
        packed[i] = load_chunk<T::kInput>(
            params.query.data, base + (static_cast<i64>(tile.first) + row) * params.query.row,
            in_dim && row < tile.end);
    }
    const int kv_head = head / (params.heads_q / params.heads_kv);
    float c[8];
    load_centre(
        c, params.centres + (static_cast<i64>(tile.span) * params.heads_kv + kv_head) * T::kDimQk,
        chunk);
    const i64 head_row = (static_cast<i64>(tile.batch) * params.heads_q + head) * params.len_q;
    const u32 lanes = ((1u << kChunks) - 1u) << (thread() % kWarpThreads & ~(kChunks - 1));
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = first + i * kStride;
        float x[8];
        widen_chunk<T::kInput>(x, packed[i]);
        u32 largest = 0;
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const u32 size = magnitude(x[e]);
            largest = size > largest ? size : largest;
            product = __fadd_rn(product, __fmul_rn(x[e], c[e]));
        }
        largest = __reduce_max_sync(lanes, largest);
#pragma unroll
        for (int step = 1; step < kChunks; step *= 2) {
            product = __fadd_rn(product, __shfl_xor_sync(kFullWarp, product, step));
        }
        Step step = step_of(largest, kKeyLimit);
        if (!finite(largest)) {
            step = {ptx::not_a_number(), 0.0f};
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e] = 0.0f;
        }
        if (row < tile.end) {
            const i64 place = head_row + tile.first + row;
            *reinterpret_cast<uint2*>(params.query_codes + place * (T::kDimQk / 4) + 2 * chunk) =
                make_uint2(pack_i8(x, step.inverse), pack_i8(x + 4, step.inverse));
            if (chunk == 0) {
                params.query_scales[place] = step.size;
                params.lse_shift[place] = __fmul_rn(product, params.scale);
            }
        }
    }
}

}  // namespace adaattn::smxx_quantize
