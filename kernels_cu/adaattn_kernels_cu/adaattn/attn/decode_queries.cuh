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

// Queries of a tile of columns to shared memory, in one of both orders, by one warp. Narrow: f16 ones,
// divided by a power of two per column; and these times scale_log2 as factors.
template <class T, bool kNarrow>
ADAATTN_DEVICE void load_tile(const Params& p, const Place& at, int tile, int lane, u32* words,
                              float* factors) {
    const int place = lane % 4, column = lane / 4, local = tile * kColumns + column;
    const bool real = local < at.rows;
    const u16* row = static_cast<const u16*>(p.query) +
                     row_offset(at, p.group, at.first_row + (real ? local : 0), p.query_batch,
                                p.query_head, p.query_row);
    uint4 x[T::kWords / 4];
#pragma unroll
    for (int w = 0; w < T::kWords; w += 4) {
        const int channel = kNarrow ? narrow_channel(w, place) : wide_channel(w, place);
        x[w / 4] = real ? *reinterpret_cast<const uint4*>(row + channel) : make_uint4(0, 0, 0, 0);
    }
    const int order = kNarrow ? T::kTiles : 0;
    u32* to = words + ((order + tile) * T::kWords / 4 * 32 + lane) * 4;
    if constexpr (!kNarrow) {
#pragma unroll
        for (int i = 0; i < T::kWords / 4; ++i) *reinterpret_cast<uint4*>(to + 128 * i) = x[i];
    } else {
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < T::kWords / 4; ++i) {
            const u32 pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const u16 low = static_cast<u16>(pairs[k]), high = static_cast<u16>(pairs[k] >> 16);
                largest = fmaxf(largest, fabsf(quant::widen<T::kInput>(low)));
                largest = fmaxf(largest, fabsf(quant::widen<T::kInput>(high)));
            }
        }
        largest = softmax::quad_max(largest);
        // 2^e just above the largest; products with 2^-e are exact where f16 can hold them.
        const u32 exponent = (ptx::float_bits(largest) >> 23) + 1;
        const bool usable = exponent > 30 && exponent < 224;
        const float unit = usable ? ptx::bits_float(exponent << 23) : 1.0f;
        const float inverse = usable ? ptx::bits_float((254 - exponent) << 23) : 1.0f;
#pragma unroll
        for (int i = 0; i < T::kWords / 4; ++i) {
            const u32 pairs[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            u32 y[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const u16 low = static_cast<u16>(pairs[k]), high = static_cast<u16>(pairs[k] >> 16);
                y[k] = ptx::pack_f16(quant::widen<T::kInput>(low) * inverse,
                                     quant::widen<T::kInput>(high) * inverse);
            }
            *reinterpret_cast<uint4*>(to + 128 * i) = make_uint4(y[0], y[1], y[2], y[3]);
        }
        if (place == 0) factors[local] = unit * p.scale_log2;
    }
}

// Queries of all tiles, in both orders, by the warps that look at keys.
template <class T>
ADAATTN_DEVICE void load_queries(const Params& p, const Place& at, int warp, int lane, u32* words,
                                 float* factors) {
    for (int i = warp; i < 2 * T::kTiles; i += T::kWarps) {
        if (i < T::kTiles) {
            load_tile<T, true>(p, at, i, lane, words, factors);
        } else {
            load_tile<T, false>(p, at, i - T::kTiles, lane, words, factors);
        }
    }
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
