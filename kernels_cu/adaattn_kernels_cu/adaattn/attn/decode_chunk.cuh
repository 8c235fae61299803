// decode_chunk.cuh -- scores and weighted values of 64 keys, and the stream that brings them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_merge.cuh"

namespace adaattn::smxx_attn_decode {

template <class T>
ADAATTN_DEVICE Chunk chunk_at(const Params& p, const i32* table, const Lane& me, int number) {
    Chunk chunk;
    chunk.number = number;
    const i32 entry = table[number / p.page_chunks];
    chunk.narrow = entry >= 0;
    chunk.page = chunk.narrow ? entry : -1 - static_cast<i64>(entry);
    const i64 first = (chunk.page * p.page_chunks + number % p.page_chunks) * kChunkKeys;
    const int bytes = chunk.narrow ? T::kDim : 2 * T::kDim;
    const void* keys = chunk.narrow ? p.key_narrow.data : p.key;
    const void* values = chunk.narrow ? p.value_narrow.data : p.value;
    chunk.keys = static_cast<const char*>(keys) + first * bytes;
    chunk.all_values = static_cast<const char*>(values) + first * bytes;
    chunk.values = chunk.all_values + 2 * me.place * bytes + (chunk.narrow ? 8 : 16) * me.key;
    return chunk;
}

// A warp's slices on their way: copied kAhead before they are needed, one group each.
template <class T>
struct Stream {
    static constexpr int kAhead = T::kStages - 1;
    u32 base;  // shared, of the warp's ring
    int lane;
    int turn;   // slot of the next slice to be read
    int start;  // slot of the next slice to be copied

    ADAATTN_DEVICE static int after(int slot) { return slot + 1 == T::kStages ? 0 : slot + 1; }

    // Every call is one group, also where there is nothing to copy.
    ADAATTN_DEVICE void copy(bool exists, const Chunk& chunk, int slice) {
        if (exists) start_slice<T>(chunk, slice, base + start * kSliceBytes, lane);
        ptx::copy_async_commit();
        start = after(start);
    }
    // Address of the next slice; it and `more` further ones have arrived, for all lanes. What lanes
    // have read before may be overwritten from here on.
    template <int kMore>
    ADAATTN_DEVICE u32 next() {
        ptx::copy_async_wait<kAhead - 1 - kMore>();
        __syncwarp();
        return take();
    }
    ADAATTN_DEVICE u32 take() {
        const u32 slot = base + turn * kSliceBytes;
        turn = after(turn);
        return slot;
    }
};

// How many slices of a chunk pass through the stream: with kSkip keys alone.
template <class T>
ADAATTN_DEVICE int streamed(const Chunk& chunk) {
    const int side = chunk.narrow ? Slices<T>::kNarrow : Slices<T>::kWide;
    return T::kSkip ? side : 2 * side;
}

// Queries for a narrow page: times the page's reach; and the scores of its centre.
template <class T>
ADAATTN_DEVICE void fold_scales(const Params& p, const Chunk& chunk, const Lane& me,
                                const float* factors, u32 (&query)[T::kTiles][T::kWords],
                                float (&factor)[T::kTiles][2], float (&offset)[T::kTiles][2]) {
    const i64 scales = chunk.page * T::kDim;
    const float unit = p.key_narrow.unit[chunk.page];
    float middle[T::kTiles][4];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
        middle[tile][0] = middle[tile][1] = middle[tile][2] = middle[tile][3] = 0.0f;
    }
#pragma unroll
    for (int w = 0; w < T::kWords; w += 4) {
        const i64 channel = scales + narrow_channel(w, me.place);
        u32 centre[4], reach[4];
        ptx::load_stream_128(centre, p.key_narrow.centre + channel);
        ptx::load_stream_128(reach, p.key_narrow.reach + channel);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const bool first_key = me.key == 0;  // row 0 of A, the others are 0
            const u32 a[4] = {first_key ? centre[i] : 0u, 0u, first_key ? centre[i + 1] : 0u, 0u};
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
                ptx::mma_f16(middle[tile], a, query[tile][w + i], query[tile][w + i + 1]);
                query[tile][w + i] = ptx::mul_f16x2(query[tile][w + i], reach[i]);
                query[tile][w + i + 1] = ptx::mul_f16x2(query[tile][w + i + 1], reach[i + 1]);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float whole = factors[tile * kColumns + 2 * me.place + j] * unit;
            offset[tile][j] = whole * ptx::broadcast(middle[tile][j], me.place);
            factor[tile][j] = whole * kCodeScale<T::kKeyCode>;
        }
    }
}

template <class T>
ADAATTN_DEVICE void hide_unseen(const Params& p, const Place& at, const Lane& me, int chunk,
                                float (&s)[kChunkSteps][T::kTiles][4]) {
    const int key = chunk * kChunkKeys;
    if (key >= at.inner_low && key + kChunkKeys <= at.inner_high) return;
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int low, high;
            row_interval(p, at, at.first_row + tile * kColumns + 2 * me.place + j, low, high);
#pragma unroll
            for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int position = key + step * kStepKeys + me.key + 8 * half;
                    if (position < low || position >= high) {
                        s[step][tile][2 * half + j] = -ptx::infinity();
                    }
                }
            }
        }
    }
}

// Scores of 64 keys in units of log2, S[step][tile]: keys 16 step + key and + 8, columns 2 place
// and + 1; -inf for what a row does not see. `read(x, i)` provides slice i of the keys.
template <class T, class Read>
ADAATTN_DEVICE void chunk_scores(const Params& p, const Place& at, const Lane& me,
                                 const Chunk& chunk, const u32* words, const float* factors,
                                 float (&s)[kChunkSteps][T::kTiles][4], Read read) {
    u32 query[T::kTiles][T::kWords];
    Slice x;
#pragma unroll
    for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
            s[step][tile][0] = s[step][tile][1] = s[step][tile][2] = s[step][tile][3] = 0.0f;
        }
    }
    if (!chunk.narrow) {
        read_words<T>(query, words, me.lane);
#pragma unroll
        for (int i = 0; i < Slices<T>::kWide; ++i) {
            read(x, i);
            use_wide_keys<T>(s, x, i, query);
        }
#pragma unroll
        for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[step][tile][i] *= p.scale_log2;
            }
        }
    } else {
        float factor[T::kTiles][2], offset[T::kTiles][2];
        read_words<T>(query, words + T::kTiles * T::kWords * 32, me.lane);
        fold_scales<T>(p, chunk, me, factors, query, factor, offset);
#pragma unroll
        for (int i = 0; i < Slices<T>::kNarrow; ++i) {
            read(x, i);
            use_narrow_keys<T>(s, x, i, query);
        }
#pragma unroll
        for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[step][tile][i] =
                        fmaf(s[step][tile][i], factor[tile][i % 2], offset[tile][i % 2]);
                }
            }
        }
    }
    hide_unseen<T>(p, at, me, chunk.number, s);
}

// Largest score of every column of the lane, over the warp's 64 keys; NaN is dropped.
template <class T>
ADAATTN_DEVICE void column_maxima(const float (&s)[kChunkSteps][T::kTiles][4],
                                  float (&largest)[T::kTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float x = -ptx::infinity();
#pragma unroll
            for (int step = 0; step < kChunkSteps; ++step) {
                x = fmaxf(x, fmaxf(s[step][tile][j], s[step][tile][2 + j]));
            }
            largest[tile][j] = over_keys(x, Larger{});
        }
    }
}

// Weights of 64 keys as B operands: rounded, and transposed from keys by columns.
template <class T, Format kFormat>
ADAATTN_DEVICE void round_weights(const float (&s)[kChunkSteps][T::kTiles][4],
                                  u32 (&weights)[kChunkSteps][T::kTiles][2]) {
#pragma unroll
    for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
            const float (&x)[4] = s[step][tile];
            weights[step][tile][0] = ptx::transpose_8x8(quant::pack_pair<kFormat>(x[0], x[1]));
            weights[step][tile][1] = ptx::transpose_8x8(quant::pack_pair<kFormat>(x[2], x[3]));
        }
    }
}

// Bits of the lane's keys that some row sees, four to a step.
ADAATTN_DEVICE u32 seen_keys(const Place& at, const Lane& me, int chunk) {
    const int key = chunk * kChunkKeys;
    if (key >= at.low && key + kChunkKeys <= at.high) return 0xffffu;
    u32 sees = 0u;
#pragma unroll
    for (int i = 0; i < 4 * kChunkSteps; ++i) {
        const int position = key + i / 4 * kStepKeys + 2 * me.place + i % 2 + i % 4 / 2 * 8;
        sees |= static_cast<u32>(position >= at.low && position < at.high) << i;
    }
    return sees;
}

// O += step * sums + middle * total, for 64 channels.
template <class T>
ADAATTN_DEVICE void add_scaled(const Params& p, const Chunk& chunk, const Lane& me, int slice,
                               float unit, const float (&sums)[T::kTiles][4][4],
                               const float (&total)[T::kTiles][2],
                               float (&o)[T::kTiles][T::kOutTiles][4]) {
    u32 centre[4], reach[4];
    const i64 channel = chunk.page * T::kDim + 64 * slice + 8 * me.key;
    ptx::load_stream_128(centre, p.value_narrow.centre + channel);
    ptx::load_stream_128(reach, p.value_narrow.reach + channel);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float middle = ptx::from_f16(static_cast<u16>(centre[j] >> (16 * half)));
            const float step = ptx::from_f16(static_cast<u16>(reach[j] >> (16 * half))) *
                               (unit * kCodeScale<T::kValueCode>);
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = o[tile][4 * slice + j][2 * half + c];
                    x = fmaf(step, sums[tile][j][2 * half + c], fmaf(middle, total[tile][c], x));
                }
            }
        }
    }
}

// Adds the weighted values of 64 keys to O; `s` holds the weights. `read(x, i)` provides slice i of
// the values.
template <class T, class Read>
ADAATTN_DEVICE void chunk_values(const Params& p, const Place& at, const Lane& me,
                                 const Chunk& chunk, const float (&s)[kChunkSteps][T::kTiles][4],
                                 float (&o)[T::kTiles][T::kOutTiles][4], Read read) {
    u32 weights[kChunkSteps][T::kTiles][2];
    Slice x;
    if (!chunk.narrow) {
        round_weights<T, T::kInput>(s, weights);
        const u32 sees = seen_keys(at, me, chunk.number);
#pragma unroll
        for (int i = 0; i < Slices<T>::kWide; ++i) {
            read(x, i);
            use_wide_values<T>(o, x, i, weights, sees);
        }
        return;
    }
    round_weights<T, Format::f16>(s, weights);
    const float unit = p.value_narrow.unit[chunk.page];
    float total[T::kTiles][2];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float sum = 0.0f;
#pragma unroll
            for (int step = 0; step < kChunkSteps; ++step) {
                sum += s[step][tile][j] + s[step][tile][2 + j];
            }
            total[tile][j] = over_keys(sum, Sum{}) * unit;
        }
    }
#pragma unroll
    for (int i = 0; i < Slices<T>::kNarrow; ++i) {
        float sums[T::kTiles][4][4];
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[tile][j][0] = sums[tile][j][1] = sums[tile][j][2] = sums[tile][j][3] = 0.0f;
            }
        }
        read(x, i);
        use_narrow_values<T>(sums, x, weights);
        add_scaled<T>(p, chunk, me, i, unit, sums, total, o);
    }
}

}  // namespace adaattn::smxx_attn_decode
