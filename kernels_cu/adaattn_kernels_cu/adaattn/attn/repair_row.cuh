// repair_row.cuh -- one query row recomputed by one warp, key by key, over its visible keys only.
// SPDX-License-Identifier: Apache-2.0
//
// The tensor-core path multiplies masked probabilities, which are 0, by whatever the values hold: 0
// x NaN = NaN would leak a value that the row must not see (a later token, or the neighbouring
// sequence of a ragged batch). Rows whose result is not finite are therefore done again here, where
// unseen keys are never touched. A row that does see a NaN or Inf keeps it.
#pragma once

#include "adaattn/attn/sm90_params.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/softmax/lse.cuh"
#include "adaattn/softmax/score_rule.cuh"

namespace adaattn {

// Columns of a source that a row sees.
template <int kRole>
ADAATTN_DEVICE mask::Interval columns_of(const AttentionParams& params, const work::WorkItem& item,
                                         const work::Source& source, int row) {
    mask::Interval seen = mask::visible_columns(item, source, source.position, source.keys, row);
    seen.start = larger(seen.start, 0);
    if constexpr (kRole == kExactRows) {
        seen.stop = smaller(seen.stop, params.row_stops[item.row_stops + row] - source.position);
    }
    return seen;
}

// Whether a row sees any key; asked where its sum is 0.
template <int kRole, int kMaxSources>
ADAATTN_DEVICE bool sees_key(const AttentionParams& params,
                             const work::WorkRecord<kMaxSources>& record, int row) {
    bool sees = false;
#pragma unroll 1
    for (int index = 0; index < record.item.sources; ++index) {
        const mask::Interval seen = columns_of<kRole>(
            params, record.item, work::source_of(record, params.sources, index), row);
        sees |= seen.start < seen.stop;
    }
    return sees;
}

template <Format kFormat, int kDimV, int kRole, int kRule, int kTileM, int kMaxSources>
ADAATTN_DEVICE void repair_row(const AttentionParams& params,
                               const work::WorkRecord<kMaxSources>& record, int row, int lane) {
    constexpr int kColumns = kDimV / kWarpThreads;
    const work::WorkItem& item = record.item;
    const u16* query = static_cast<const u16*>(params.query.data) +
                       params.query.offset(item.batch, item.head, item.row_first + row);
    float best = -ptx::infinity();
    float sum = 0.0f;
    bool sees = false;
    float acc[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;

#pragma unroll 1
    for (int index = 0; index < item.sources; ++index) {
        const work::Source& source = work::source_of(record, params.sources, index);
        const mask::Interval seen = columns_of<kRole>(params, item, source, row);
        sees |= seen.start < seen.stop;
        const u16* keys =
            static_cast<const u16*>(params.key[source.tensor].data) +
            params.key[source.tensor].offset(source.batch, source.head, source.first_key);
        const u16* values =
            static_cast<const u16*>(params.value[source.tensor].data) +
            params.value[source.tensor].offset(source.batch, source.head, source.first_key);
        const i64 key_stride = params.key[source.tensor].stride_row;
        const i64 value_stride = params.value[source.tensor].stride_row;
#pragma unroll 1
        for (int base = seen.start; base < seen.stop; base += kWarpThreads) {
            float score = -ptx::infinity();  // log2 units
            if (base + lane < seen.stop) {
                const u16* key = keys + (base + lane) * key_stride;
                float dot = 0.0f;
#pragma unroll 1
                for (int k = 0; k < params.dim_qk; ++k) {
                    dot = fmaf(quant::widen<kFormat>(query[k]), quant::widen<kFormat>(key[k]), dot);
                }
                if constexpr (kRole == kAdaptive) {
                    if (source.first_bias != work::kNoBias) {
                        dot += params.bias[source.first_bias + base + lane] * params.inverse_scale;
                    }
                }
                if constexpr ((kRule & softmax::kSoftcap) != 0) {
                    dot = softmax::capped<true>(dot, params.softcap_rate);
                }
                score = dot * params.scale_log2;
            }
            float highest = score;
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                highest = fmaxf(highest, ptx::shuffle_xor(highest, offset));
            }
            highest = fmaxf(highest, best);
            const float factor = highest == best ? 1.0f : ptx::exp2_approx(best - highest);
            // A score of -inf has no weight; its difference from a maximum of -inf would be NaN.
            const float weight =
                score == -ptx::infinity() ? 0.0f : ptx::exp2_approx(score - highest);
            best = highest;
            sum = sum * factor + weight;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) acc[c] *= factor;
            const int count = smaller(seen.stop - base, kWarpThreads);
#pragma unroll 1
            for (int k = 0; k < count; ++k) {
                const float shared_weight = __shfl_sync(kFullWarp, weight, k);
                const u16* value = values + (base + k) * value_stride;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    const int column = c * kWarpThreads + lane;
                    if (column < params.dim_v) {
                        acc[c] = fmaf(shared_weight, quant::widen<kFormat>(value[column]), acc[c]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += ptx::shuffle_xor(sum, offset);
    sum = softmax::known_sum(sum, sees);

    float inverse = sum == 0.0f ? 0.0f : ptx::reciprocal_approx(sum);
    [[maybe_unused]] softmax::Finished finished;
    if constexpr ((kRule & softmax::kSinks) != 0) {
        finished = softmax::finish_with_sink(best, 1.0f, sum, params.sinks[item.head]);
        inverse = finished.inverse;
    }
    if constexpr (kRole == kExactRows) {
        const i64 place = static_cast<i64>(item.partial) * kTileM + row;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int column = c * kWarpThreads + lane;
            if (column < params.dim_v) {
                params.partial_out[place * params.dim_v + column] = acc[c] * inverse;
            }
        }
        if (lane == 0) {
            params.partial_lse[place] = softmax::natural_lse(best, 1.0f, sum);
        }
        return;
    }
    u16* out = static_cast<u16*>(const_cast<void*>(params.out.data)) +
               params.out.offset(item.batch, item.head, item.row_first + row);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const int column = c * kWarpThreads + lane;
        if (column < params.dim_v) out[column] = quant::narrow<kFormat>(acc[c] * inverse);
    }
    if (lane == 0) {
        float* lse = static_cast<float*>(const_cast<void*>(params.lse.data)) +
                     params.lse.offset(item.batch, item.head, item.row_first + row);
        if constexpr ((kRule & softmax::kSinks) != 0) {
            *lse = finished.lse;
        } else {
            *lse = softmax::natural_lse(best, 1.0f, sum);
        }
    }
}

}  // namespace adaattn
