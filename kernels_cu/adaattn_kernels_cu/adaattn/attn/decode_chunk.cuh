// decode_chunk.cuh -- scores and weighted values of 64 keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_merge.cuh"
#include "adaattn/attn/decode_stream.cuh"

namespace adaattn::smxx_attn_decode {

// Queries for a narrow page: times the page's reach; and the scores of its centre.
template <class T>
ADAATTN_DEVICE void fold_scales(float unit, u32 scales, const Lane& me, const float* factors,
                                u32 (&query)[T::kTiles][T::kWords], float (&factor)[T::kTiles][2],
                                float (&offset)[T::kTiles][2]) {
    float middle[T::kTiles][4];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
        middle[tile][0] = middle[tile][1] = middle[tile][2] = middle[tile][3] = 0.0f;
    }
#pragma unroll
    for (int w = 0; w < T::kWords; w += 4) {
        const u32 at = scales + 2 * narrow_channel(w, me.place);
        u32 centre[4], reach[4];
        ptx::load_shared_128(centre, at);
        ptx::load_shared_128(reach, at + 2 * T::kDim);
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

// Scores of the 64 keys of a chunk, whose slices are next in the stream, in units of log2.
// S[step][tile]: keys 16 step + key and + 8, columns 2 place and + 1; -inf for what a row does not see.
// `unit` is the page's, if it is narrow.
template <class T>
ADAATTN_DEVICE void chunk_scores(const Params& p, const Place& at, const Lane& me,
                                 const Chunk& chunk, float unit, const u32* words,
                                 const float* factors, float (&s)[kChunkSteps][T::kTiles][4],
                                 Stream<T>& stream) {
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
            read_keys<T, false>(x, stream.template take<0>(p), me.lane);
            stream.release(p, 1);
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
#pragma unroll
        for (int i = 0; i < Slices<T>::kNarrow; ++i) {
            const u32 slot = stream.template take<0>(p);
            read_keys<T, true>(x, slot, me.lane);
            if (i == 0) {
                fold_scales<T>(unit, slot + kSliceBytes, me, factors, query, factor, offset);
            }
            stream.release(p, 1);
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

// O += step * sums + middle * total, for 64 channels; the page's centres and reaches are at `scales`.
template <class T>
ADAATTN_DEVICE void add_scaled(u32 scales, const Lane& me, int slice, float unit,
                               const float (&sums)[T::kTiles][4][4],
                               const float (&total)[T::kTiles][2],
                               float (&o)[T::kTiles][T::kOutTiles][4]) {
    u32 centre[4], reach[4];
    const u32 at = scales + 2 * (64 * slice + 8 * me.key);
    ptx::load_shared_128(centre, at);
    ptx::load_shared_128(reach, at + 2 * T::kDim);
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

// Weights of a chunk, ready to meet its values.
template <class T>
struct Held {
    Chunk chunk;
    float unit;  // of its values, where the page is narrow
    u32 weights[kChunkSteps][T::kTiles][2];
    float total[T::kTiles][2];  // of the weights, in units of the page

    ADAATTN_DEVICE void hold(const Chunk& of, float page_unit,
                             const float (&s)[kChunkSteps][T::kTiles][4]) {
        chunk = of;
        unit = page_unit;
        if (!chunk.narrow) {
            round_weights<T, T::kInput>(s, weights);
            return;
        }
        round_weights<T, Format::f16>(s, weights);
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
    }
};

// Adds the weighted values of a chunk to O: next in the stream or, with kSkip, fetched before.
template <class T>
ADAATTN_DEVICE void add_values(const Params& p, const Place& at, const Lane& me,
                               const Held<T>& held, float (&o)[T::kTiles][T::kOutTiles][4],
                               Stream<T>& stream) {
    Slice x;
    if constexpr (T::kSkip) stream.await_values();
    if (!held.chunk.narrow) {
        const u32 sees = seen_keys(at, me, held.chunk.number);
#pragma unroll
        for (int i = 0; i < Slices<T>::kWide; ++i) {
            if constexpr (T::kSkip) {
                read_wide_values<T>(x, stream.value_slot(i), me.lane);
            } else {
                read_wide_values<T>(x, stream.template take<0>(p), me.lane);
                stream.release(p, 1);
            }
            use_wide_values<T>(o, x, i, held.weights, sees);
        }
        return;
    }
    constexpr int kNarrow = Slices<T>::kNarrow;
    u32 slots[kNarrow];
    if constexpr (T::kSkip) {
#pragma unroll
        for (int i = 0; i < kNarrow; ++i) slots[i] = stream.value_slot(i);
    } else {
        take_all<T>(p, stream, slots);
    }
#pragma unroll
    for (int i = 0; i < kNarrow; ++i) {
        float sums[T::kTiles][4][4];
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[tile][j][0] = sums[tile][j][1] = sums[tile][j][2] = sums[tile][j][3] = 0.0f;
            }
        }
        read_narrow_values<T>(x, slots, i, me.lane);
        use_narrow_values<T>(sums, x, held.weights);
        add_scaled<T>(slots[0] + kSliceBytes, me, i, held.unit, sums, held.total, o);
    }
    if constexpr (!T::kSkip) stream.release(p, kNarrow);
}

}  // namespace adaattn::smxx_attn_decode
