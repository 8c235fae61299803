// decode_queries.cuh -- which rows and keys a block computes, and its queries in shared memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_pages.cuh"
#include "adaattn/softmax/online.cuh"

namespace adaattn::smxx_attn_decode {

// What a block computes: the unit's place in the arrays, and its keys in chunks of 64.
struct Place {
    int batch, head_kv, first_row, rows;  // packed rows of this tile
    int start, stop;                      // visible keys of the sequence
    int low, high;                        // keys that some row of the tile sees
    int inner_low, inner_high;            // keys that all of them see
};

ADAATTN_DEVICE void row_interval(const Params& p, const Place& at, int row, int& low, int& high) {
    const int position = at.stop - p.len_q + row / p.group;
    high = p.causal ? smaller(position + 1, at.stop) : at.stop;
    low = p.left >= 0 ? larger(at.start, position - p.left) : at.start;
}

// The unit's place; `read_lengths` says which keys there are.
template <class T>
ADAATTN_DEVICE Place place_of(const Params& p, int unit) {
    Place at;
    const int head = unit / p.row_tiles;
    at.batch = head / p.heads_kv;
    at.head_kv = head % p.heads_kv;
    at.first_row = unit % p.row_tiles * T::kAllColumns;
    at.rows = smaller(p.group * p.len_q - at.first_row, T::kAllColumns);
    return at;
}
ADAATTN_DEVICE void read_lengths(const Params& p, Place& at) {
    at.start = p.starts[at.batch];
    at.stop = p.lengths[at.batch];
    row_interval(p, at, at.first_row, at.low, at.inner_high);
    row_interval(p, at, at.first_row + at.rows - 1, at.inner_low, at.high);
}

ADAATTN_DEVICE i64 row_offset(const Place& at, int group, int row, i64 batch, i64 head, i64 step) {
    return at.batch * batch + (at.head_kv * group + row % group) * head + row / group * step;
}

// One warp: queries of a tile of columns to shared memory in both orders, f16 ones divided by a
// power of two per column, and these times scale_log2 as factors.
template <class T>
ADAATTN_DEVICE void load_queries(const Params& p, const Place& at, int tile, int lane, u32* words,
                                 float* factors) {
    const int place = lane % 4, column = lane / 4, local = tile * kColumns + column;
    const bool real = local < at.rows;
    const u16* row = static_cast<const u16*>(p.query) +
                     row_offset(at, p.group, at.first_row + (real ? local : 0), p.query_batch,
                                p.query_head, p.query_row);
    float largest = 0.0f;
    u32* wide = words + (tile * T::kWords / 4 * 32 + lane) * 4;
#pragma unroll
    for (int w = 0; w < T::kWords; ++w) {
        const u32 pair = real ? *reinterpret_cast<const u32*>(row + wide_channel(w, place)) : 0u;
        wide[w / 4 * 128 + w % 4] = pair;
        largest = fmaxf(largest, fabsf(quant::widen<T::kInput>(static_cast<u16>(pair))));
        largest = fmaxf(largest, fabsf(quant::widen<T::kInput>(static_cast<u16>(pair >> 16))));
    }
    largest = softmax::quad_max(largest);
    // 2^e just above the largest; products with 2^-e are exact where f16 can hold them.
    const u32 exponent = (ptx::float_bits(largest) >> 23) + 1;
    const bool usable = exponent > 30 && exponent < 224;
    const float unit = usable ? ptx::bits_float(exponent << 23) : 1.0f;
    const float inverse = usable ? ptx::bits_float((254 - exponent) << 23) : 1.0f;
    u32* narrow = wide + T::kTiles * T::kWords * 32;
#pragma unroll
    for (int w = 0; w < T::kWords; ++w) {
        const u32 pair = real ? *reinterpret_cast<const u32*>(row + narrow_channel(w, place)) : 0u;
        const float low = quant::widen<T::kInput>(static_cast<u16>(pair)) * inverse;
        const float high = quant::widen<T::kInput>(static_cast<u16>(pair >> 16)) * inverse;
        narrow[w / 4 * 128 + w % 4] = ptx::pack_f16(low, high);
    }
    if (place == 0) factors[local] = unit * p.scale_log2;
}

template <class T>
ADAATTN_DEVICE void read_words(u32 (&query)[T::kTiles][T::kWords], const u32* words, int lane) {
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int w = 0; w < T::kWords; w += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(
                words + ((tile * T::kWords + w) / 4 * 32 + lane) * 4);
            query[tile][w] = four.x;
            query[tile][w + 1] = four.y;
            query[tile][w + 2] = four.z;
            query[tile][w + 3] = four.w;
        }
    }
}

struct Lane {
    int lane, key, place;  // key = lane / 4, place = lane % 4
};

}  // namespace adaattn::smxx_attn_decode
