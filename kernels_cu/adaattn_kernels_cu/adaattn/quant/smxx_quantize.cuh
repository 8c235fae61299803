// smxx_quantize.cuh -- queries and keys to i8 and values to e4m3, laid out for 8-bit products.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    Two launches, one pass over each array in the second.
//              kCentres  for each sequence and key head: c, about the mean key. Up to 64 evenly
//                        spaced visible keys, in four groups; of the groups' means the middle two
//                        are averaged, so that one outlying key does not move c far.
//              kCodes    a block takes 256 rows of one head:
//                        keys    k - c; a scale for the 16 keys of 64 that one lane of a quad holds
//                                of a score tile; round((k - c) / step).
//                        values  one scale for the 256 keys of a tile; transposed, keys permuted
//                                so that a score fragment, packed, is the other operand.
//                        queries a scale a row; and scale q . c, which the lse is short of.
//              Any c leaves softmax as it is. Source: SageAttention2, arXiv 2411.10958 (smoothing,
//              per-thread scales); the transposition fused, the sampled centre: this project.
// Numerics     f32 throughout, in an order that the twin (adaattn_reference/quantise.py) repeats,
//              so codes, scales and centres are equal bit by bit. step = max(amax, 1e-30) / limit,
//              multiplied by limit / max(amax, 1e-30); limit 127 (i8) or 448 (e4m3).
//              What is not finite: a group of keys, or a query, that holds such a number has a NaN
//              scale and codes of 0; such a value is e4m3's NaN. The attention kernel's rows are
//              then not finite and are repaired from the arrays themselves.
// Tiles        256 rows; chunks of 8 elements a thread.
// Shared mem   | name       | type | shape            | live                      |
//              | halves     | u32  | 4 x 32           | key maxima of half a warp |
//              | warps      | u32  | 2 x 16           | value maxima              |
//              | transposed | u32  | kDimV x 65       | four keys of a channel    |
//              Static. The rotation of a channel's words keeps stores and loads free of conflicts.
// Registers    A row chunk of 64 floats; no spill.
// Barriers     All threads, between the writing and the reading of each shared array.
// Limits       dims multiples of 8, at most 128; rows begin on 16 bytes; 64-bit offsets.
// Ladder       docs/kernels/sm90_attn_fwd_8bit.md.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=0
#pragma once

#include "adaattn/quant/quantize_params.cuh"
#include "adaattn/quant/quantize_tile.cuh"

namespace adaattn::smxx_quantize {

template <int kPartT, Format kInputT, int kDimQkT, int kDimVT, int kQkT, int kPvT>
struct Traits {
    static constexpr int kPart = kPartT;
    static constexpr Format kInput = kInputT;
    static constexpr int kDimQk = kDimQkT;  // 64 or 128: the arrays' dims padded
    static constexpr int kDimV = kDimVT;
    static constexpr bool kQk = kQkT != 0;  // whether queries and keys are wanted
    static constexpr bool kPv = kPvT != 0;  // whether values are
    static constexpr int kThreads = 512;
    static constexpr int kBlocks = 2;  // copies of one run under the arithmetic of the other
    static constexpr int kSmemBytes = 0;
    static_assert(kDimQk == 64 || kDimQk == 128, "a row is shared by 8 or 16 lanes");
    static_assert(kDimV == 64 || kDimV == 128, "a row is shared by 8 or 16 lanes");
};

template <class T>
ADAATTN_DEVICE void find_centre(const Params& params) {
    __shared__ float means[kGroups][T::kDimQk];
    const int index = static_cast<int>(blockIdx.x) / params.heads_kv;
    const int head = static_cast<int>(blockIdx.x) % params.heads_kv;
    const Span span = params.spans[index];
    const int count = span.high - span.low;
    const int samples = smaller(count, kSamples);
    constexpr int kChunks = T::kDimQk / 8;
    const int chunk = thread() % kChunks;
    const int group = thread() / kChunks;
    if (group < kGroups) {
        float sum[8] = {};
        const bool exists = 8 * chunk < params.dim_qk;
        const i64 base = span.batch * params.key.batch + head * params.key.head + 8 * chunk;
#pragma unroll 4
        for (int s = group; s < samples; s += kGroups) {
            const i64 row = span.low + (2 * static_cast<i64>(s) + 1) * count / (2 * samples);
            float x[8];
            widen_chunk<T::kInput>(
                x, load_chunk<T::kInput>(params.key.data, base + row * params.key.row, exists));
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sum[i] = __fadd_rn(sum[i], finite(ptx::float_bits(x[i])) ? x[i] : 0.0f);
            }
        }
        const int own = (samples - group + kGroups - 1) / kGroups;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            // Fewer than one key a group: sums, divided below.
            means[group][8 * chunk + i] =
                samples < kGroups ? sum[i] : __fdiv_rn(sum[i], static_cast<float>(own));
        }
    }
    __syncthreads();  // all threads: means are written before they are read
    if (thread() < T::kDimQk) {
        const float a = means[0][thread()], b = means[1][thread()];
        const float c = means[2][thread()], d = means[3][thread()];
        float centre;
        if (samples < kGroups) {
            centre =
                __fdiv_rn(__fadd_rn(__fadd_rn(a, b), c), static_cast<float>(larger(samples, 1)));
        } else {
            const float low = fmaxf(fminf(a, b), fminf(c, d));
            const float high = fminf(fmaxf(a, b), fmaxf(c, d));
            centre = __fadd_rn(__fmul_rn(0.5f, low), __fmul_rn(0.5f, high));
        }
        if (params.smooth == 0 || !finite(ptx::float_bits(centre))) centre = 0.0f;
        params.centres[static_cast<i64>(blockIdx.x) * T::kDimQk + thread()] = centre;
    }
}

// Whether some query head of `count` from `first` on, of a batch entry, is wanted.
ADAATTN_DEVICE bool wanted(const Params& params, int batch, int first, int count) {
    if (params.decision == nullptr) return true;
    bool found = false;
    for (int head = first; head < first + count; ++head)
        found |= params.decision[batch * params.heads_q + head] == -1;
    return found;
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const int ratio = params.heads_q / params.heads_kv;
    if constexpr (T::kPart == kCentres) {
        find_centre<T>(params);
    } else {
        // Of each tile of keys a block for either half of the keys and one for the values.
        constexpr int kParts = (T::kQk ? 2 : 0) + (T::kPv ? 1 : 0);
        const int block = static_cast<int>(blockIdx.x);
        if (block < kParts * params.key_tile_count) {
            const Tile tile = params.key_tiles[block / kParts];
            const int part = block % kParts;
            if (!wanted(params, tile.batch, tile.head * ratio, ratio)) return;
            if (T::kQk && part < 2) {
                quantise_keys<T>(params, tile, tile.head, part);
            } else {
                quantise_values<T>(params, tile, tile.head);
            }
        } else if constexpr (T::kQk) {
            const int half = block - kParts * params.key_tile_count;
            const Tile tile = params.query_tiles[half / 2];
            if (!wanted(params, tile.batch, tile.head, 1)) return;
            quantise_queries<T>(params, tile, tile.head, half % 2);
        }
    }
}

}  // namespace adaattn::smxx_quantize
