// sm80_bwd_weights.cuh -- from scores to weights and to gradients of scores, in registers.
// SPDX-License-Identifier: Apache-2.0
//
// T is the Traits of sm80_attn_bwd. Fragments are own rows x streamed rows; a query is an own row,
// or where keys are own (T::kOwnKeys) a streamed one.
#pragma once

#include "adaattn/attn/sm80_bwd_params.cuh"
#include "adaattn/mask/sm80_mask.cuh"
#include "adaattn/mma/sm80_products.cuh"
#include "adaattn/softmax/row_state.cuh"
#include "adaattn/softmax/score_rule.cuh"

namespace adaattn::sm80_attn_bwd {

// |lse| in base 2 from which its last digit is no longer small beside the logarithm of a sum.
constexpr float kFarLse = 1024.0f;

// Rows that see nothing have an `inverse` of 0, and are not far.
ADAATTN_DEVICE bool is_far(const RowRecord& record, float score_scale) {
    const float size = ptx::mul_rn(record.top, score_scale);
    return (size > kFarLse || size < -kFarLse) && record.inverse != 0.0f;
}

ADAATTN_DEVICE RowRecord* records_of(const Params& params, i64 batch, i64 head, i64 row) {
    return params.rows + (batch * params.heads_q + head) * params.len_q + row;
}

// Loads the records of this lane's own rows; whether any of them is far.
template <class T>
ADAATTN_DEVICE bool load_own_rows(RowRecord (&own)[T::kRowTiles][2], const RowRecord* records,
                                  int warp_row, int rows, float score_scale) {
    bool far = false;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * m + 8 * half + (ptx::thread_index() & 31) / 4;
            own[m][half] = RowRecord{};
            if (row < rows) {
                own[m][half] = records[row];
                far |= is_far(own[m][half], score_scale);
            }
        }
    }
    return far;
}

// Copies the records of a streamed tile to shared memory; zeros beyond the last of `left`.
template <class T>
ADAATTN_DEVICE void fill_records(u32 to, const RowRecord* records, int left) {
    for (int i = ptx::thread_index(); i < T::kColumns; i += T::kThreads) {
        RowRecord record = {};
        if (i < left) record = records[i];
        const u32 words[4] = {ptx::float_bits(record.top), ptx::float_bits(record.inverse),
                              ptx::float_bits(record.delta), 0u};
        ptx::store_shared_128(to + 16 * i, words);
    }
}

ADAATTN_DEVICE RowRecord load_record(u32 from) {
    u32 words[4];
    ptx::load_shared_128(words, from);
    return {ptx::bits_float(words[0]), ptx::bits_float(words[1]), ptx::bits_float(words[2]), 0.0f};
}

constexpr bool is_capped(int rule) { return (rule & softmax::kSoftcap) != 0; }

// y = tanh(rate s), ahead of every mask.
template <class T>
ADAATTN_DEVICE void cap_scores(mma::Scores<typename T::OfFirst>& scores, float rate) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                scores[m][n][e] = softmax::capped<is_narrow(T::kMul)>(scores[m][n][e], rate);
            }
        }
    }
}

// Scores become weights, products of the output's gradient become gradients of the scores: chosen
// 0 where a row does not see a key, so that a NaN there is gone. Under a softcap scores are y.
template <class T, bool kCut>
ADAATTN_DEVICE void weigh(mma::Scores<typename T::OfFirst>& weights,
                          mma::Scores<typename T::OfSecond>& d_scores,
                          const RowRecord (&own)[T::kRowTiles][2], u32 records,
                          const mask::WorkItem& item, const mask::ArrayMask& arrays,
                          const Params& params, int warp_row, int first_column) {
    const int lane = ptx::thread_index() & 31;
    constexpr int kColumnTiles = T::kColumns / 8;
    mask::Interval here[T::kRowTiles][2] = {};
#pragma unroll
    for (int m = 0; kCut && m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * m + 8 * half + lane / 4;
            const mask::Interval seen = mask::visible(item, row);
            const int lane_column = first_column + 2 * (lane & 3);
            here[m][half] = {seen.start - lane_column, seen.stop - lane_column};
        }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            RowRecord record;
            if constexpr (T::kOwnKeys) {
                record = load_record(records + 16 * (8 * n + 2 * (lane & 3) + e));
            }
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if constexpr (!T::kOwnKeys) record = own[m][half];
                    float& weight = weights[m][n][2 * half + e];
                    const float score = weight;
                    bool sees = !kCut || here[m][half].holds(8 * n + e);
                    if constexpr (T::kArrayMask) {
                        const int row = warp_row + 16 * m + 8 * half + lane / 4;
                        const float added =
                            sees && row < item.rows
                                ? arrays.added(row, first_column + 2 * (lane & 3) + 8 * n + e)
                                : -ptx::infinity();
                        sees = added != -ptx::infinity();
                        weight = ptx::fma_rn(weight, params.scale, added);
                    }
                    weight = ptx::exp2_approx(ptx::mul_rn(weight - record.top, params.score_scale));
                    weight = sees ? weight * record.inverse : 0.0f;
                    if constexpr (T::kWantsFirst) {
                        float& d_score = d_scores[m][n][2 * half + e];
                        d_score = sees ? weight * (d_score - record.delta) : 0.0f;
                        if constexpr (is_capped(softmax::rule_of<T>(0))) {
                            d_score = sees ? d_score * ptx::fma_rn(-score, score, 1.0f) : 0.0f;
                        }
                    }
                }
            }
        }
    }
}

// Adds the gradients of the scores to those of the additive mask, whose broadcast axes have stride
// 0. Where none is broadcast every entry is added to once.
template <class T>
ADAATTN_DEVICE void add_bias_gradient(const Params& params,
                                      const mma::Scores<typename T::OfSecond>& d_scores,
                                      const mma::Scores<typename T::OfFirst>& weights,
                                      const mask::WorkItem& item, i64 first_key, int keys,
                                      int warp_row, int first_column) {
    const int lane = ptx::thread_index() & 31;
    float* base = params.d_bias + item.batch * params.d_bias_batch +
                  item.head * params.d_bias_head + item.row_first * params.d_bias_row +
                  first_key * params.d_bias_key;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < T::kColumns / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const i64 row = warp_row + 16 * m + 8 * (e / 2) + lane / 4;
                const i64 column = first_column + 8 * n + 2 * (lane & 3) + (e & 1);
                // A weight of 0 has a gradient of 0, or NaN where something is not finite.
                const bool exists = row < item.rows && column < keys;
                if (exists && !(weights[m][n][e] == 0.0f && d_scores[m][n][e] == 0.0f)) {
                    ptx::add_global(base + row * params.d_bias_row + column * params.d_bias_key,
                                    d_scores[m][n][e]);
                }
            }
        }
    }
}

// acc += weights x tile, the weights rounded to the operand format on the way (r4).
template <class Product>
ADAATTN_DEVICE void add_product(mma::Output<Product>& acc, const mma::Scores<Product>& weights,
                                u32 tile) {
    const int lane = ptx::thread_index() & 31;
    if constexpr (is_narrow(Product::kPv)) {
        mma::add_values_narrow<Product>(
            acc, weights, tile::row_operand<typename Product::ValueTile>(tile, 0, lane));
    } else {
        mma::add_values_wide<Product>(acc, weights, tile);
    }
}

// Writes what the far rows' weights are made from: the pair that the lse could not hold. `sink` is
// in their units, or -inf.
template <class T>
ADAATTN_DEVICE void store_statistics(const softmax::RowState<T::kRowTiles>& state,
                                     const RowRecord (&own)[T::kRowTiles][2], RowRecord* records,
                                     int warp_row, int rows, float score_scale, float sink) {
    const int lane = ptx::thread_index() & 31;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * m + 8 * half + lane / 4;
            if (row < rows && (lane & 3) == 0 && is_far(own[m][half], score_scale)) {
                const float top = state.top[m][half];
                // The sum is relative to the rounded product, the weights will be to `top` itself.
                const float ref = ptx::mul_rn(top, score_scale);
                const bool shifted = ref > softmax::kLargeRef || ref < -softmax::kLargeRef;
                const float rest = shifted ? 0.0f : ptx::fma_rn(top, score_scale, -ref);
                const float above = ptx::mul_rn(sink - top, score_scale);
                const float share = sink == -ptx::infinity() ? 0.0f : ptx::exp2_approx(above);
                records[row].top = top;
                records[row].inverse =
                    1.0f / (state.sum[m][half] * ptx::exp2_approx(-rest) + share);
            }
        }
    }
}

}  // namespace adaattn::sm80_attn_bwd
