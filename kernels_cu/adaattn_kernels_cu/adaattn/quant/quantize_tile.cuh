// quantize_tile.cuh -- 256 rows of one head to codes and scales.
// SPDX-License-Identifier: Apache-2.0
//
// The work of one block of smxx_quantize.cuh, which says what is computed; T is its Traits.
#pragma once

#include "adaattn/ptx/packed.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/ptx/sm89.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/quant/quantize_params.cuh"
#include "adaattn/quant/scale_tile.cuh"

namespace adaattn::smxx_quantize {

constexpr int kHalfRows = kTileKeys / 2;  // of keys or queries that a block takes

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

// Largest magnitudes of the low and of the high halves of packed numbers, so far in `pairs`: bits of
// 16-bit formats order as their magnitudes do, what is not finite highest.
ADAATTN_DEVICE u32 largest_pairs(u32 pairs, uint4 packed) {
    constexpr u32 kMagnitudes = 0x7fff7fffu;
    pairs = __vmaxu2(__vmaxu2(pairs, packed.x & kMagnitudes), packed.y & kMagnitudes);
    return __vmaxu2(__vmaxu2(pairs, packed.z & kMagnitudes), packed.w & kMagnitudes);
}
ADAATTN_DEVICE u32 largest_half(u32 pairs) {
    const u32 low = pairs & 0xffffu, high = pairs >> 16;
    return low > high ? low : high;
}
template <Format kInput>
__device__ constexpr u32 kInfinite = kInput == Format::bf16 ? 0x7f80u : 0x7c00u;

// From here on the compiler takes the numbers for others, and keeps nothing computed from them.
ADAATTN_DEVICE void forget(uint4& packed) {
    asm volatile("" : "+r"(packed.x), "+r"(packed.y), "+r"(packed.z), "+r"(packed.w));
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

// To nearest even: the sum with 3 2^22 has the integer in its low bits.
ADAATTN_DEVICE u32 pack_i8(const float* x, float inverse) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        bits[i] = ptx::float_bits(__fadd_rn(__fmul_rn(x[i], inverse), 12582912.0f));
    }
    return ptx::pick_bytes<0x5410>(ptx::pick_bytes<0x0040>(bits[0], bits[1]),
                                   ptx::pick_bytes<0x0040>(bits[2], bits[3]));
}

// Eight codes of a row; zeros where a number of its group is not finite.
ADAATTN_DEVICE uint2 pack_row(const float (&x)[8], Step step) {
    const u32 kept = step.inverse == 0.0f ? 0u : ~0u;
    return make_uint2(pack_i8(x, step.inverse) & kept, pack_i8(x + 4, step.inverse) & kept);
}

// The chunk of a head's centre.
ADAATTN_DEVICE void load_centre(float (&c)[8], const float* centre, int chunk) {
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = __ldg(centre + 8 * chunk + i);
}

template <class T>
ADAATTN_DEVICE void quantise_keys(const Params& params, const Tile& tile, int head, int half) {
    constexpr int kSpans = kHalfRows / kScaleKeys;
    __shared__ u32 halves[kSpans][T::kThreads / 16];
    constexpr int kChunks = T::kDimQk / 8;
    constexpr int kStride = T::kThreads / kChunks;  // rows of one pass
    constexpr int kPasses = kHalfRows / kStride;
    const int chunk = thread() % kChunks;
    const int first = thread() / kChunks;
    const int own = half * kHalfRows + first;  // row of the first pass
    const bool in_dim = 8 * chunk < params.dim_qk;
    const bool whole = tile.begin == 0 && tile.end == kTileKeys;  // as nearly all are
    const i64 base = tile.batch * params.key.batch + head * params.key.head + 8 * chunk;
    uint4 packed[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = own + i * kStride;
        packed[i] = load_chunk<T::kInput>(
            params.key.data, base + (static_cast<i64>(tile.first) + row) * params.key.row,
            in_dim && row >= tile.begin && row < tile.end);
    }
    float c[8];
    load_centre(c,
                params.centres + (static_cast<i64>(tile.span) * params.heads_kv + head) * T::kDimQk,
                chunk);
    // Centred keys are computed twice: kept, they would cost the block's neighbour its registers.
    const auto centred = [&](float (&x)[8], int i) {
        const int row = own + i * kStride;
        const bool counts = whole || (row >= tile.begin && row < tile.end);
        widen_chunk<T::kInput>(x, packed[i]);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = counts ? __fsub_rn(x[e], c[e]) : 0.0f;
    };
    u32 largest[kSpans] = {};
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        float x[8];
        centred(x, i);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            u32& most = largest[kSpans * i / kPasses];
            const u32 size = magnitude(x[e]);
            most = size > most ? size : most;
        }
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) forget(packed[i]);
    // A half-warp's rows are all of one group.
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
        u32 most = largest[span];
#pragma unroll
        for (int step = 8; step > 0; step /= 2) {
            const u32 other = __shfl_xor_sync(kFullWarp, most, step);
            most = other > most ? other : most;
        }
        if (thread() % 16 == 0) halves[span][thread() / 16] = most;
    }
    __syncthreads();  // all threads: maxima are written before they are read
    // Group of row r: r % 8 / 2. Half-warp h holds row h of every thirty-two, or rows 2 h and
    // 2 h + 1 of every sixty-four.
    static_assert(kStride % 8 == 0, "a thread's rows are all of one group");
    const int group = first % 8 / 2;
    Step steps[kSpans];
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < T::kThreads / 64; ++i) {
            const u32 other =
                halves[span][kChunks == 16 ? 2 * group + i % 2 + 8 * (i / 2) : group + 4 * i];
            most = other > most ? other : most;
        }
        steps[span] = step_of(most, kKeyLimit);
        if (!finite(most)) steps[span] = {ptx::not_a_number(), 0.0f};
        if (thread() % kChunks == 0 && first < 8 && first % 2 == 0) {
            params.tile_scales[tile_scale_index(params.heads_kv, params.rows_kv, tile.batch, head,
                                                tile.place) +
                               4 * (kSpans * half + span) + group] = steps[span].size;
        }
    }
    u32* codes =
        params.key_codes +
        ((static_cast<i64>(tile.batch) * params.heads_kv + head) * params.rows_kv + tile.place) *
            (T::kDimQk / 4);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const Step step = steps[kSpans * i / kPasses];
        float x[8];
        centred(x, i);
        *reinterpret_cast<uint2*>(codes + (own + i * kStride) * (T::kDimQk / 4) + 2 * chunk) =
            pack_row(x, step);
    }
}

// Inf becomes NaN: saturation would make a number of it.
template <Format kInput>
ADAATTN_DEVICE u32 finite_or_nan(u32 pair) {
    u32 found = pair;
    if ((pair & 0x7fffu) >= kInfinite<kInput>) found |= 0x7fffu;
    if ((pair >> 16 & 0x7fffu) >= kInfinite<kInput>) found |= 0x7fff0000u;
    return found;
}
template <Format kInput>
ADAATTN_DEVICE uint4 finite_or_nan(uint4 packed) {
    return make_uint4(finite_or_nan<kInput>(packed.x), finite_or_nan<kInput>(packed.y),
                      finite_or_nan<kInput>(packed.z), finite_or_nan<kInput>(packed.w));
}

// Bits of the largest finite magnitude.
template <Format kInput>
ADAATTN_DEVICE u32 largest_finite(u32 most, uint4 packed) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 size = words[i / 2] >> (16 * (i % 2)) & 0x7fffu;
        if (size < kInfinite<kInput> && size > most) most = size;
    }
    return most;
}

// The largest number of the block's threads, through one place for each warp.
template <class T>
ADAATTN_DEVICE u32 largest_of_block(u32 own, u32 (&warps)[T::kThreads / kWarpThreads]) {
    own = __reduce_max_sync(kFullWarp, own);
    if (thread() % kWarpThreads == 0) warps[thread() / kWarpThreads] = own;
    __syncthreads();  // all threads: maxima are written before they are read
#pragma unroll
    for (int i = 0; i < T::kThreads / kWarpThreads; ++i) own = warps[i] > own ? warps[i] : own;
    return own;
}

template <class T>
ADAATTN_DEVICE void quantise_values(const Params& params, const Tile& tile, int head) {
    __shared__ u32 warps[2][T::kThreads / kWarpThreads];
    constexpr int kWords = kTileKeys / 4;  // of a channel
    __shared__ u32 transposed[T::kDimV][kWords + 1];
    constexpr int kChunks = T::kDimV / 8;
    constexpr int kStride = T::kThreads / kChunks;  // quads of keys of one pass
    constexpr int kPasses = kWords / kStride;
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
    u32 pairs = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) pairs = largest_pairs(pairs, packed[i][k]);
    }
    u32 largest = largest_of_block<T>(largest_half(pairs), warps[0]);
    if (largest >= kInfinite<T::kInput>) {  // alike in the whole block
        u32 own = 0;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                packed[i][k] = finite_or_nan<T::kInput>(packed[i][k]);
                own = largest_finite<T::kInput>(own, packed[i][k]);
            }
        }
        largest = largest_of_block<T>(own, warps[1]);
    }
    const Step step =
        step_of(ptx::float_bits(quant::widen<T::kInput>(static_cast<u16>(largest))), kValueLimit);
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
        const int word = (first + i * kStride + rotation) % kWords;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float scaled[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                scaled[k] = __fmul_rn(x[k][e], step.inverse);
            }
            transposed[8 * chunk + e][word] =
                ptx::pack_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]);
        }
    }
    __syncthreads();  // all threads: codes are written before they are read
    const i64 head_row = (static_cast<i64>(tile.batch) * params.heads_kv + head) * T::kDimV;
    // A warp reads eight parts of four channels, from all banks.
#pragma unroll
    for (int i = 0; i < T::kDimV * kWords / 4 / T::kThreads; ++i) {
        const int channel = (thread() + i / (kWords / 32) * T::kThreads) / 8;
        const int part = thread() % 8 + 8 * (i % (kWords / 32));
        const int turn = 2 * (channel / 32);
        const u32* words = transposed[channel];
        uint4 out;
        out.x = words[(4 * part + turn) % kWords];
        out.y = words[(4 * part + turn + 1) % kWords];
        out.z = words[(4 * part + turn + 2) % kWords];
        out.w = words[(4 * part + turn + 3) % kWords];
        *reinterpret_cast<uint4*>(params.value_codes +
                                  ((head_row + channel) * params.rows_kv + tile.place) / 4 +
                                  4 * part) = out;
    }
}

template <class T>
ADAATTN_DEVICE void quantise_queries(const Params& params, const Tile& tile, int head, int half) {
    constexpr int kChunks = T::kDimQk / 8;
    constexpr int kStride = T::kThreads / kChunks;
    constexpr int kPasses = kHalfRows / kStride;
    static_assert(kPasses % 2 == 0, "two rows' magnitudes share a word");
    const int chunk = thread() % kChunks;
    const int first = thread() / kChunks;
    const bool in_dim = 8 * chunk < params.dim_qk;
    const i64 base = tile.batch * params.query.batch + head * params.query.head + 8 * chunk;
    const int kv_head = head / (params.heads_q / params.heads_kv);
    float c[8];
    load_centre(
        c, params.centres + (static_cast<i64>(tile.span) * params.heads_kv + kv_head) * T::kDimQk,
        chunk);
    const i64 head_row = (static_cast<i64>(tile.batch) * params.heads_q + head) * params.len_q;
    uint4 packed[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        const int row = half * kHalfRows + first + i * kStride;
        packed[i] = load_chunk<T::kInput>(
            params.query.data, base + (static_cast<i64>(tile.first) + row) * params.query.row,
            in_dim && row < tile.end);
    }
#pragma unroll
    for (int i = 0; i < kPasses; i += 2) {
        u32 both = largest_half(largest_pairs(0, packed[i])) |
                   largest_half(largest_pairs(0, packed[i + 1])) << 16;
#pragma unroll
        for (int step = 1; step < kChunks; step *= 2) {
            both = __vmaxu2(both, __shfl_xor_sync(kFullWarp, both, step));
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int row = half * kHalfRows + first + (i + k) * kStride;
            const u32 largest = k == 0 ? both & 0xffffu : both >> 16;
            float x[8];
            widen_chunk<T::kInput>(x, packed[i + k]);
            float product = 0.0f;
#pragma unroll
            for (int e = 0; e < 8; ++e) product = __fadd_rn(product, __fmul_rn(x[e], c[e]));
#pragma unroll
            for (int step = 1; step < kChunks; step *= 2) {
                product = __fadd_rn(product, __shfl_xor_sync(kFullWarp, product, step));
            }
            Step step = step_of(ptx::float_bits(quant::widen<T::kInput>(static_cast<u16>(largest))),
                                kKeyLimit);
            if (largest >= kInfinite<T::kInput>) step = {ptx::not_a_number(), 0.0f};
            if (row < tile.end) {
                const i64 place = head_row + tile.first + row;
                *reinterpret_cast<uint2*>(params.query_codes + place * (T::kDimQk / 4) +
                                          2 * chunk) = pack_row(x, step);
                if (chunk == 0) {
                    params.query_scales[place] = step.size;
                    params.lse_shift[place] = __fmul_rn(product, params.scale);
                }
            }
        }
    }
}

}  // namespace adaattn::smxx_quantize
