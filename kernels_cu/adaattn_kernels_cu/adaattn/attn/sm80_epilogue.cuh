// sm80_epilogue.cuh -- out and lse of one warp's rows, from accumulators to global memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/sm80_params.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/mma/sm80_products.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/softmax/lse.cuh"
#include "adaattn/softmax/row_state.cuh"
#include "adaattn/softmax/score_rule.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::sm80_attn_fwd {

template <Format kInput>
ADAATTN_DEVICE void store_element(char* row, int column, float x) {
    if constexpr (kInput == Format::f32) {
        reinterpret_cast<float*>(row)[column] = x;
    } else {
        reinterpret_cast<u16*>(row)[column] = static_cast<u16>(quant::pack_pair<kInput>(x, 0.0f));
    }
}

// Columns column + 2t and + 1 (x), column + 8 + 2t and + 1 (y) of one row, t = lane % 4. All lanes
// of the warp must call; those with writes == false store nothing.
template <class T>
ADAATTN_DEVICE void store_columns(char* row, int column, const float (&x)[2], const float (&y)[2],
                                  int dim, bool writes) {
    const int t = ptx::thread_index() & 3;
    if constexpr (!T::kVectorised) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int at = column + 2 * t + e;
            if (writes && at < dim) {
                store_element<T::kInput>(row, at, x[e]);
            }
            if (writes && at + 8 < dim) {
                store_element<T::kInput>(row, at + 8, y[e]);
            }
        }
    } else if constexpr (T::kInput == Format::f32) {
        const int at = column + 2 * t;
        if (writes && at < dim) {
            ptx::store_global_64(row + at * 4, ptx::float_bits(x[0]), ptx::float_bits(x[1]));
        }
        if (writes && at + 8 < dim) {
            ptx::store_global_64(row + (at + 8) * 4, ptx::float_bits(y[0]), ptx::float_bits(y[1]));
        }
    } else {
        // Neighbours trade halves: the even lane then holds four columns of x, the odd one of y,
        // and the quad writes one whole 32-byte sector.
        const u32 mine_x = quant::pack_pair<T::kInput>(x[0], x[1]);
        const u32 mine_y = quant::pack_pair<T::kInput>(y[0], y[1]);
        const bool odd = t & 1;
        const u32 received = ptx::shuffle_xor(odd ? mine_x : mine_y, 1);
        const int at = odd ? column + 8 + 2 * (t - 1) : column + 2 * t;
        if (writes && at < dim) {
            ptx::store_global_64(row + at * 2, odd ? received : mine_x, odd ? mine_y : received);
        }
    }
}

// (r6) out = O / sum and lse of this warp's rows; `state` is finished.
template <class T, class ParamsT>
ADAATTN_DEVICE void store_rows(const mma::Output<T>& out,
                               const softmax::RowState<T::kRowTiles>& state, const ParamsT& params,
                               const work::WorkItem& item, u32 saw, float scale) {
    const int lane = ptx::thread_index() & 31;
    if constexpr (T::kArrayMask) {  // each lane of a row looked at columns of its own
        saw |= ptx::shuffle_xor(saw, 1);
        saw |= ptx::shuffle_xor(saw, 2);
    }
    const int first_row = ptx::thread_index() / 32 * T::kRowsPerWarp;
    constexpr int kBytes = storage_bytes(T::kInput);
    const i64 row_zero = static_cast<i64>(item.row_first);
    char* base = static_cast<char*>(params.out) +
                 (item.batch * params.out_batch + item.head * params.out_head) * kBytes;
    float* lse = params.lse + item.batch * params.lse_batch + item.head * params.lse_head;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            const bool writes = row < item.rows;
            bool sees = false;
            if constexpr (T::kArrayMask || T::kListed) {
                sees = saw >> (2 * m + half) & 1u;
            } else {
                const mask::Interval seen = mask::visible(item, row);
                sees = seen.start < seen.stop;
            }
            const float sum = softmax::known_sum(state.sum[m][half], sees);
            float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // no visible key: out = 0
            [[maybe_unused]] softmax::Finished finished;
            if constexpr ((softmax::rule_of<T>(0) & softmax::kSinks) != 0) {
                finished = softmax::finish_with_sink(state.top[m][half], scale, sum,
                                                     params.sinks[item.head]);
                inverse = finished.inverse;
            }
            char* out_row = base + (row_zero + row) * params.out_row * kBytes;
            if (writes && (lane & 3) == 0) {
                if constexpr ((softmax::rule_of<T>(0) & softmax::kSinks) != 0) {
                    lse[row_zero + row] = finished.lse;
                } else {
                    lse[row_zero + row] = state.lse(m, half, sum, scale);
                }
            }
#pragma unroll
            for (int n = 0; n < T::kValueTiles; n += 2) {
                const float x[2] = {out[m][n][2 * half] * inverse,
                                    out[m][n][2 * half + 1] * inverse};
                const float y[2] = {out[m][n + 1][2 * half] * inverse,
                                    out[m][n + 1][2 * half + 1] * inverse};
                store_columns<T>(out_row, 8 * n, x, y, params.dim_v, writes);
            }
        }
    }
}

}  // namespace adaattn::sm80_attn_fwd
