// sm90_quantised_params.cuh -- the one argument of the 8-bit attention kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/sm90_params.cuh"

namespace adaattn {

// The tensor maps of the base are those of the operands; its matrices those of the caller's arrays.
// Mirrored in adaattn_cuda/kernels/sm90_attn_fwd_8bit.py.
struct QuantisedParams : AttentionParams {
    const float* query_scales;  // (batch, heads_q, len_q), and so is
    const float* lse_shift;
    const float* tile_scales;  // (batch, heads_kv, rows_kv / kTileKeys, kTileScales)
    i32 heads_q;
    i32 heads_kv;
    i32 len_q;
    i32 rows_kv;
    float weight_log2;   // log2 of the factor on weights
    float weight_slack;  // how far a weight may exceed it, log2
    float zero;          // 0, which the compiler does not know
    i32 reserved[3];
};

static_assert(sizeof(QuantisedParams) == 1408, "mirrored by the host");

}  // namespace adaattn
