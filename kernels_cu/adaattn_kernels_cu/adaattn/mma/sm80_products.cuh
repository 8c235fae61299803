// sm80_products.cuh -- the two matrix products of one warp's rows: S = Q K^T and O += P V.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/mma/fragment.cuh"
#include "adaattn/tile/sm80_tile.cuh"

namespace adaattn::mma {

template <class T>
using Scores = Accumulator<T::kRowTiles, T::kKeyTiles>;
template <class T>
using Output = Accumulator<T::kRowTiles, T::kValueTiles>;

template <int kRowTiles, int kColumnTiles>
ADAATTN_DEVICE void clear(Accumulator<kRowTiles, kColumnTiles>& x) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                x[m][n][e] = 0.0f;
            }
        }
    }
}

// Adds k-step `step` of Q K^T to `scores`.
template <class T>
ADAATTN_DEVICE void add_score_step(Scores<T>& scores, u32 query, u32 key, int step) {
    Fragment<T::kQk, 4> a[T::kRowTiles];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::load_matrices(a[m].high, tile::moved<typename T::QueryTile>(query, step, 16 * m));
        a[m].split();
    }
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; n += 2) {
        Fragment<T::kQk, 4> b;
        ptx::load_matrices(b.high, tile::moved<typename T::KeyTile>(key, step, 8 * n));
        b.split();
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
            multiply<T::kQk, 0>(scores[m][n], a[m], b);
            multiply<T::kQk, 2>(scores[m][n + 1], a[m], b);
        }
    }
}

// S = Q K^T of this warp's rows. `query` and `key` are per-lane operand addresses.
template <class T>
ADAATTN_DEVICE void compute_scores(Scores<T>& scores, u32 query, u32 key) {
    clear<T::kRowTiles, T::kKeyTiles>(scores);
    if constexpr (is_narrow(T::kQk)) {
#pragma unroll
        for (int step = 0; step < T::kQkSteps; ++step) {
            add_score_step<T>(scores, query, key, step);
        }
    } else {
#pragma unroll 1
        for (int flush = 0; flush < T::kQkSteps; flush += T::kFlushSteps) {
            // Four steps are one 128-byte line of a row, so the swizzle is the same each time.
            const u32 line = static_cast<u32>(flush / 4) * 128;
            Scores<T> partial;
            clear<T::kRowTiles, T::kKeyTiles>(partial);
            // A long row of O leaves few registers for loads ahead of their use.
            [[maybe_unused]] constexpr int kUnroll = T::kValueTiles > 16 ? 2 : T::kFlushSteps;
#pragma unroll kUnroll
            for (int step = 0; step < T::kFlushSteps; ++step) {
                add_score_step<T>(partial, query + line, key + line, step);
            }
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
                for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        scores[m][n][e] += partial[m][n][e];
                    }
                }
            }
        }
    }
}

// O = alpha O for one row tile.
template <int kColumnTiles>
ADAATTN_DEVICE void rescale(float (&out)[kColumnTiles][4], const float (&alpha)[2]) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            out[n][e] *= alpha[e / 2];
        }
    }
}

// O += P V in a 16-bit format: the score fragment is already the A operand's layout.
template <class T>
ADAATTN_DEVICE void add_values_narrow(Output<T>& out, const Scores<T>& weights, u32 value) {
#pragma unroll
    for (int k = 0; k < T::kTileN / 16; ++k) {
        Fragment<T::kPv, 4> a[T::kRowTiles];
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // (r4)
                const float (&p)[4] = weights[m][2 * k + i / 2];
                a[m].high[i] = quant::pack_pair<T::kPv>(p[2 * (i & 1)], p[2 * (i & 1) + 1]);
            }
        }
#pragma unroll
        for (int n = 0; n < T::kValueTiles; n += 2) {
            Fragment<T::kPv, 4> b;
            ptx::load_matrices_transposed(b.high,
                                          tile::moved<typename T::ValueTile>(value, n / 2, 16 * k));
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
                multiply<T::kPv, 0>(out[m][n], a[m], b);
                multiply<T::kPv, 2>(out[m][n + 1], a[m], b);
            }
        }
    }
}

// O += P V in a 32-bit format. The A operand wants keys t and t + 4 where the score fragment holds
// keys 2t and 2t + 1 (t = lane % 4); naming the keys of each group of eight in that order makes
// them agree, and the reads of V follow it. `value` is the tile's base.
template <class T>
ADAATTN_DEVICE void add_values_wide(Output<T>& out, const Scores<T>& weights, u32 value) {
    using ValueTile = typename T::ValueTile;
    // n8 blocks whose short partial sums are held at a time; a long row of O leaves room for fewer.
    constexpr int kBlocks = T::kValueTiles > 16 ? 2 : 4;
    const int lane = ptx::thread_index() & 31;
    const u32 even = value + ValueTile::element_offset(2 * (lane & 3), lane / 4);
    const u32 odd = value + ValueTile::element_offset(2 * (lane & 3) + 1, lane / 4);
    // Split once here: in the loop below it would be compiled again for every block of columns.
    Fragment<T::kPv, 4> split[T::kKeyTiles][T::kRowTiles];
#pragma unroll
    for (int k = 0; k < T::kKeyTiles; ++k) {
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
            const float (&p)[4] = weights[m][k];
            split[k][m].high[0] = ptx::float_bits(p[0]);
            split[k][m].high[1] = ptx::float_bits(p[2]);
            split[k][m].high[2] = ptx::float_bits(p[1]);
            split[k][m].high[3] = ptx::float_bits(p[3]);
            split[k][m].split();
        }
    }
#pragma unroll
    for (int first = 0; first < T::kValueTiles; first += kBlocks) {
        Accumulator<T::kRowTiles, kBlocks> partial;
        clear<T::kRowTiles, kBlocks>(partial);
#pragma unroll
        for (int k = 0; k < T::kKeyTiles; ++k) {
            const auto& a = split[k];
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                Fragment<T::kPv, 2> b;
                b.high[0] = ptx::load_shared_32(tile::moved<ValueTile>(even, first + n, 8 * k));
                b.high[1] = ptx::load_shared_32(tile::moved<ValueTile>(odd, first + n, 8 * k));
                b.split();
#pragma unroll
                for (int m = 0; m < T::kRowTiles; ++m) {
                    multiply<T::kPv, 0>(partial[m][n], a[m], b);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    out[m][first + n][e] += partial[m][n][e];
                }
            }
        }
    }
}

}  // namespace adaattn::mma
