// far_pool.cuh -- one weighted average of keys and values per block of 64 far keys, group and query head.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block of threads holds kBlocks blocks of 64 keys and values of one key head; its warps go through the slots
//              (groups of its query heads) 16 at a time. For a slot and a block b, over the n keys that are no landmarks:
//              1. w_j = mass_j + 0.1 mean mass, normalised to sum 1;    2. k_b = sum_j w_j k_j,  v_b = sum_j w_j v_j:
//              a matrix product, slots x 64 by 64 x dim, so K and V are read once for all groups and query heads.
//              3. ln of the block's mass and ln n, from which far_fit makes the bias.
//              Source: this project, docs/design/0004.
// Numerics     w in 16 bits (its rounding moves k_b and v_b by 2^-8 of the spread: any weights serve), products with f32 sums.
// Tiles        8 warps; m16n8k16: 16 slots, 8 dims, 16 keys.
// Shared mem   | name    | type   | shape                   | swizzle                | live        |
//              | keys    | 16 bit | kBlocks x 64 x dim_qk   | 16-byte piece ^ key % 8 | whole block |
//              | values  | 16 bit | kBlocks x 64 x dim_v    | the same               | whole block |
//              Nothing is aliased.
// Budget: registers<=255 spill_bytes=0 smem_bytes<=232448
// Limits       dims multiples of 8 up to 256.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_pool {

constexpr float kEvenShare = 0.1f;  // of the mean mass, added to every key's

struct Params {
    far::Sizes sizes;
    far::Rows key;
    far::Rows value;
    const far::Group* groups;
    const unsigned char* codes;
    const far::Selection* selections;
    const far_gather::Slot* slots;  // (batch, heads_q, slots_per_head)
    const i32* pool_first;          // of the same shape: first pool row of a slot
    u16* pool_key;                  // (rows, dim_qk)
    u16* pool_value;                // (rows, dim_v)
    float2*
        pool_mass;  // (rows): ln of the samples' mass, ln of the count; -inf where there is no key
    i32 slots_per_head;
    i32 padding;
};

template <Format kFormatT, int kDimT, int kBlocksT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDim = kDimT;  // both dims padded to a multiple of 64
    static constexpr int kBlocks = kBlocksT;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = kWarps * kWarpThreads;
    static constexpr int kRowBytes = kDim * 2;
    static constexpr int kArrayBytes = kBlocks * far::kPoolKeys * kRowBytes;
    static constexpr int kSmemBytes = 2 * kArrayBytes;
    static_assert(kWarps % kBlocks == 0, "as many warps for every block");
};

template <class T>
ADAATTN_DEVICE void load_rows(u32 to, const far::Rows& from, int batch, int head, int first,
                              int len, int dim) {
    constexpr int kPieces = T::kDim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < T::kBlocks * far::kPoolKeys * kPieces;
         i += T::kThreads) {
        const int row = i / kPieces;
        const int piece = i % kPieces;
        const bool valid = first + row < len && 8 * piece < dim;
        ptx::copy_async_16(to + row * T::kRowBytes + ((piece ^ (row & 7)) << 4),
                           from.at(batch, head, valid ? first + row : 0) + (valid ? 8 * piece : 0),
                           valid);
    }
}

// What a lane knows of the two slots (rows lane / 4 and 8 further of the fragment) that its weights belong to.
struct Own {
    const unsigned char* codes;  // of the block; null: the slot has no use for it
    int threshold;
    i64 place;  // pool row
};

template <class T>
ADAATTN_DEVICE Own own_slot(const Params& params, int first_head, int number, int slots,
                            int block) {
    Own own = {nullptr, 0, 0};
    if (number >= slots) return own;
    const far::Sizes& sizes = params.sizes;
    const int index = first_head * params.slots_per_head + number;
    const far_gather::Slot slot = params.slots[index];
    if (slot.head < 0 || params.groups[slot.group].far_keys <= block * far::kPoolKeys) return own;
    const i64 row = static_cast<i64>(slot.head) * sizes.groups + slot.group;
    own.codes = params.codes + row * sizes.code_stride + block * far::kPoolKeys;
    own.threshold = params.selections[row * far::kLevelsMax + slot.level].threshold;
    own.place = static_cast<i64>(params.pool_first[index]) + block;
    return own;
}

ADAATTN_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// This lane's share of a slot's weights, as rows of A: word k holds keys 8 k + 2 (lane % 4) + {0, 1}.
template <class T>
ADAATTN_DEVICE void weigh(const Params& params, const Own& own, int lane, u32 (&weights)[8]) {
    float mass[16];
    float total = 0.0f;
    float count = 0.0f;
    u32 kept = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        u32 pair = 0xffffu;
        if (own.codes != nullptr)
            pair = *reinterpret_cast<const u16*>(own.codes + 8 * k + 2 * (lane % 4));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int code = static_cast<int>(pair >> (8 * e) & 255u);
            const bool in = own.codes != nullptr && code < own.threshold;
            mass[2 * k + e] = in ? far::mass_of(code) : 0.0f;
            kept |= static_cast<u32>(in) << (2 * k + e);
            total += mass[2 * k + e];
            count += in ? 1.0f : 0.0f;
        }
    }
    total = quad_sum(total);
    count = quad_sum(count);
    const float even = kEvenShare * total / fmaxf(count, 1.0f);
    const float inverse = 1.0f / fmaxf((1.0f + kEvenShare) * total, 1e-30f);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float low = kept >> (2 * k) & 1u ? (mass[2 * k] + even) * inverse : 0.0f;
        const float high = kept >> (2 * k + 1) & 1u ? (mass[2 * k + 1] + even) * inverse : 0.0f;
        weights[k] = quant::pack_pair<T::kFormat>(low, high);
    }
    if (own.codes != nullptr && lane % 4 == 0) {
        params.pool_mass[own.place] = count > 0.0f
                                          ? make_float2(logf(fmaxf(total, 1e-30f)), logf(count))
                                          : make_float2(-ptx::infinity(), -ptx::infinity());
    }
}

// Weighted averages of one array: 16 slots x dim.
template <class T>
ADAATTN_DEVICE void average(u32 rows, const u32 (&first)[8], const u32 (&second)[8],
                            const Own (&own)[2], u16* to, int dim, int lane) {
#pragma unroll 2
    for (int column = 0; column < T::kDim / 16; ++column) {
        float sums[2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            // Keys 16 k .. 16 k + 15, dims 16 column .. + 15: matrices (keys low, high) x (dims low, high).
            const int key = 16 * k + lane % 16;
            const int piece = 2 * column + lane / 16;
            u32 b[4];
            ptx::load_matrices_transposed(b,
                                          rows + key * T::kRowBytes + ((piece ^ (key & 7)) << 4));
            const u32 a[4] = {first[2 * k], second[2 * k], first[2 * k + 1], second[2 * k + 1]};
            if constexpr (T::kFormat == Format::bf16) {
                ptx::mma_bf16(sums[0], a, b[0], b[1]);
                ptx::mma_bf16(sums[1], a, b[2], b[3]);
            } else {
                ptx::mma_f16(sums[0], a, b[0], b[1]);
                ptx::mma_f16(sums[1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = 16 * column + 8 * half + 2 * (lane % 4);
            if (at >= dim) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (own[r].codes != nullptr) {
                    *reinterpret_cast<u32*>(to + own[r].place * dim + at) =
                        quant::pack_pair<T::kFormat>(sums[half][2 * r], sums[half][2 * r + 1]);
                }
            }
        }
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    extern __shared__ __align__(128) char shared[];
    const far::Sizes& sizes = params.sizes;
    const int ratio = sizes.heads_q / sizes.heads_kv;
    const int stretches = ceil_div(sizes.len_kv / far::kPoolKeys, T::kBlocks);
    const int stretch = static_cast<int>(blockIdx.x % stretches);
    const int head_kv = static_cast<int>(blockIdx.x / stretches) % sizes.heads_kv;
    const int batch = static_cast<int>(blockIdx.x / stretches) / sizes.heads_kv;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int first_head = batch * sizes.heads_q + head_kv * ratio;
    const int slots = ratio * params.slots_per_head;

    // Whether any slot wants these blocks: one look before K and V are read.
    __shared__ int wanted;
    if (threadIdx.x == 0) wanted = 0;
    __syncthreads();
    bool mine = false;
    for (int number = static_cast<int>(threadIdx.x); number < slots; number += T::kThreads) {
        const far_gather::Slot slot = params.slots[first_head * params.slots_per_head + number];
        mine |= slot.head >= 0 &&
                params.groups[slot.group].far_keys > stretch * T::kBlocks * far::kPoolKeys;
    }
    if (mine) wanted = 1;
    __syncthreads();
    if (!wanted) return;

    const u32 keys = static_cast<u32>(__cvta_generic_to_shared(shared));
    const u32 values = keys + T::kArrayBytes;
    const int first_key = stretch * T::kBlocks * far::kPoolKeys;
    load_rows<T>(keys, params.key, batch, head_kv, first_key, sizes.len_kv, sizes.dim_qk);
    load_rows<T>(values, params.value, batch, head_kv, first_key, sizes.len_kv, sizes.dim_v);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    const int block = stretch * T::kBlocks + warp % T::kBlocks;
    const u32 offset = (warp % T::kBlocks) * far::kPoolKeys * T::kRowBytes;
    constexpr int kTeams = T::kWarps / T::kBlocks;
    for (int first = 16 * (warp / T::kBlocks); first < slots; first += 16 * kTeams) {
        const Own own[2] = {own_slot<T>(params, first_head, first + lane / 4, slots, block),
                            own_slot<T>(params, first_head, first + lane / 4 + 8, slots, block)};
        if (!__any_sync(kFullWarp, own[0].codes != nullptr || own[1].codes != nullptr)) continue;
        u32 weights[2][8];
        weigh<T>(params, own[0], lane, weights[0]);
        weigh<T>(params, own[1], lane, weights[1]);
        average<T>(keys + offset, weights[0], weights[1], own, params.pool_key, sizes.dim_qk, lane);
        average<T>(values + offset, weights[0], weights[1], own, params.pool_value, sizes.dim_v,
                   lane);
    }
}

}  // namespace adaattn::far_pool
