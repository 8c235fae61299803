// sm90_epilogue.cuh -- normalises a warp's 16 output rows and writes them with their lse.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/repair_row.cuh"
#include "adaattn/attn/sm90_params.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/softmax/online.cuh"
#include "adaattn/softmax/score_rule.cuh"

namespace adaattn {

// Transposes a 4 x 4 matrix of words held by a quad (lane t: row t), so that every lane can store
// 16 contiguous bytes.
ADAATTN_DEVICE void transpose_quad(u32 (&words)[4], int lane) {
    const bool odd = lane & 1;
    const bool high = lane & 2;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        const u32 received = ptx::shuffle_xor(odd ? words[pair] : words[pair + 1], 1);
        (odd ? words[pair] : words[pair + 1]) = received;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 received = ptx::shuffle_xor(high ? words[i] : words[i + 2], 2);
        (high ? words[i] : words[i + 2]) = received;
    }
}

// Writes the lse of a warp's 16 rows, of which `row` is the first within the tile, and leaves the
// reciprocals of this thread's two row sums; 0 for a row that saw no key, whose output is 0.
template <int kRole, int kRule, int kTileM, int kMaxSources>
ADAATTN_DEVICE void write_lse(const AttentionParams& params,
                              const work::WorkRecord<kMaxSources>& record,
                              const softmax::Online& state, int row, int lane,
                              float (&inverse_sum)[2]) {
    const work::WorkItem& item = record.item;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int own_row = row + lane / 4 + 8 * r;
        float sum = softmax::quad_sum(state.sum[r]);
        if (sum == 0.0f && own_row < item.rows) {
            sum = softmax::known_sum(sum, sees_key<kRole>(params, record, own_row));
        }
        [[maybe_unused]] softmax::Finished finished;
        if constexpr ((kRule & softmax::kSinks) != 0) {
            finished = softmax::finish_with_sink(state.reference[r], params.scale_log2, sum,
                                                 params.sinks[item.head]);
            inverse_sum[r] = finished.inverse;
        } else {
            inverse_sum[r] = sum == 0.0f ? 0.0f : ptx::reciprocal_approx(sum);
        }
        if (lane % 4 == 0 && own_row < item.rows) {
            float* lse = static_cast<float*>(const_cast<void*>(params.lse.data)) +
                         params.lse.offset(item.batch, item.head, item.row_first + own_row);
            if constexpr (kRole != kDense) {
                if (item.partial != work::kNoPartial) {
                    lse = params.partial_lse + static_cast<i64>(item.partial) * kTileM + own_row;
                }
            }
            if constexpr ((kRule & softmax::kSinks) != 0) {
                *lse = finished.lse;
            } else {
                *lse = state.lse(r, sum, params.scale_log2);
            }
        }
    }
}

// A partial result: the same rows, normalised, in f32.
template <int kDimV, int kTileM>
ADAATTN_DEVICE void write_partial(const AttentionParams& params, const work::WorkItem& item,
                                  const float (&acc)[kDimV / 2], const float (&inverse_sum)[2],
                                  int row, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int own_row = row + lane / 4 + 8 * r;
        if (own_row >= item.rows) continue;
        float* out =
            params.partial_out + (static_cast<i64>(item.partial) * kTileM + own_row) * params.dim_v;
#pragma unroll
        for (int block = 0; block < kDimV / 8; ++block) {
            const int column = 8 * block + 2 * (lane % 4);
            if (column < params.dim_v) {
                *reinterpret_cast<float2*>(out + column) =
                    make_float2(acc[4 * block + 2 * r] * inverse_sum[r],
                                acc[4 * block + 2 * r + 1] * inverse_sum[r]);
            }
        }
    }
}

// Normalises and writes the same rows; accumulators as wgmma leaves them.
template <Format kFormat, int kDimV, int kRole, int kRule, int kTileM, int kMaxSources>
ADAATTN_DEVICE void write_rows(const AttentionParams& params,
                               const work::WorkRecord<kMaxSources>& record,
                               const float (&acc)[kDimV / 2], const float (&inverse_sum)[2],
                               int row, int lane) {
    const work::WorkItem& item = record.item;
    if constexpr (kRole != kDense) {
        if (item.partial != work::kNoPartial) {
            write_partial<kDimV, kTileM>(params, item, acc, inverse_sum, row, lane);
            if constexpr (kRole == kAdaptive) return;
        }
    }
    u32 broken_quads[2];  // bit 4 q: row q (+ 8) of the 16 is not finite
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int own_row = row + lane / 4 + 8 * r;
        const bool exists = own_row < item.rows;
        float poison = 0.0f * inverse_sum[r];  // NaN as soon as one factor is NaN or Inf
        u16* out = static_cast<u16*>(const_cast<void*>(params.out.data)) +
                   params.out.offset(item.batch, item.head, item.row_first + own_row);
#pragma unroll
        for (int block = 0; block < kDimV / 8; block += 4) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = acc[4 * (block + i) + 2 * r];
                const float high = acc[4 * (block + i) + 2 * r + 1];
                poison = fmaf(low, 0.0f, fmaf(high, 0.0f, poison));
                words[i] = quant::pack_pair<kFormat>(low * inverse_sum[r], high * inverse_sum[r]);
                if constexpr (kRole == kAdaptive) {
                    const float first = low * inverse_sum[r];
                    const float second = high * inverse_sum[r];
                    if (exists) squares = fmaf(first, first, fmaf(second, second, squares));
                }
            }
            transpose_quad(words, lane);
            const int column = 8 * (block + lane % 4);
            if (kRole != kExactRows && exists && column < params.dim_v) {
                *reinterpret_cast<uint4*>(out + column) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
        const u32 lanes = __ballot_sync(kFullWarp, exists && !(poison == 0.0f));
        broken_quads[r] = (lanes | lanes >> 1 | lanes >> 2 | lanes >> 3) & 0x11111111u;
    }
    if constexpr (kRole == kAdaptive) {
        const i64 head = static_cast<i64>(item.batch) * params.squares_batch +
                         static_cast<i64>(item.head) * params.squares_head;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) squares += ptx::shuffle_xor(squares, step);
        if (lane == 0 && row < item.rows) {
            params.squares[head + (item.row_first + row) / 16] = squares;
        }
    }
    if ((broken_quads[0] | broken_quads[1]) == 0) return;
    __syncwarp();  // the stores above come before the repaired ones, whichever lane made them
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
        const u32 broken = i < 8 ? broken_quads[0] : broken_quads[1];
        if (broken >> (4 * (i % 8)) & 1u)
            repair_row<kFormat, kDimV, kRole, kRule, kTileM>(params, record, row + i, lane);
    }
    if constexpr (kRole == kAdaptive) {
        __syncwarp();
        float again = 0.0f;
        for (int i = 0; i < 16 && row + i < item.rows; ++i) {
            const u16* out = static_cast<const u16*>(params.out.data) +
                             params.out.offset(item.batch, item.head, item.row_first + row + i);
            for (int column = lane; column < params.dim_v; column += kWarpThreads) {
                const float x = quant::widen<kFormat>(__ldcg(out + column));
                again = fmaf(x, x, again);
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) again += ptx::shuffle_xor(again, step);
        if (lane == 0) {
            params.squares[static_cast<i64>(item.batch) * params.squares_batch +
                           static_cast<i64>(item.head) * params.squares_head +
                           (item.row_first + row) / 16] = again;
        }
    }
}

}  // namespace adaattn
