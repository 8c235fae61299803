// sm80_bwd_params.cuh -- what the host hands to the backward kernels of the sm80 family.
// SPDX-License-Identifier: Apache-2.0
//
// The twin, field by field, is Params of adaattn_cuda/kernels/sm80_attn_bwd.py.
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/work/units.cuh"

namespace adaattn::sm80_attn_bwd {

// What the weights of a query row are made from, and what is taken off the products of its
// gradient: p_j = 2^((s_j - top) scale) inverse, ds_j = p_j (dp_j - delta).
struct alignas(16) RowRecord {
    float top;      // in the units that `score_scale` multiplies
    float inverse;  // 1, but for rows whose lse is too large to hold the digits of their sum, and
                    // 0 for rows that see nothing
    float delta;    // sum of out x grad_out, less the gradient of the lse
    float reserved;
};

// The two arrays that are multiplied row by row: (query, grad_out) or (key, value). Strides are in
// elements; the last axis has stride 1.
struct Side {
    const void* first;   // (batch, heads, len, dim_qk)
    const void* second;  // (batch, heads, len, dim_v)
    i64 first_batch, first_head, first_row;
    i64 second_batch, second_head, second_row;
};

struct Params {
    const unsigned char* allowed;  // masks as sm80_params.cuh has them
    const void* bias;
    RowRecord* rows;  // (batch, heads_q, len_q)
    void* d_first;    // gradients of own.first and own.second, contiguous, input type
    void* d_second;
    float* d_bias;       // same axes as `bias`, added to; or null
    const float* sinks;  // (heads_q), or null: the lse counts them
    const u32* broken;   // where this is given and 0 there is nothing to do; or null
    Side own;            // a block holds one tile of these rows ...
    Side streamed;       // ... and walks over those

    i64 allowed_batch, allowed_head, allowed_row, allowed_key;  // row: of `own`, key: of `streamed`
    i64 bias_batch, bias_head, bias_row, bias_key;
    i64 d_bias_batch, d_bias_head, d_bias_row, d_bias_key;

    i32 dim_qk, dim_v;
    i32 heads_q, len_q;  // of `rows`
    i32 own_heads, own_len;
    i32 group;  // streamed heads of one own head: 1, or the query heads that share a key head
    mask::BiasType bias_type;
    i32 blocks, grid;    // blocks of work, and of the launch, which take them in turn
    float scale;         // factor on the scores; under a softcap the cap
    float score_scale;   // scale * log2(e), or with array masks log2(e)
    float softcap_rate;  // under a softcap: what scores are multiplied by before the tanh
    float out_scale;     // factor on the gradients of queries and keys

    work::UnitList work;  // as seen from `own`
};

using RuledParams = Params;  // a softcap takes nothing that is not here

}  // namespace adaattn::sm80_attn_bwd
