// sm80_params.cuh -- what the host hands to the sm80 family: arrays, masks, work.
// SPDX-License-Identifier: Apache-2.0
//
// The twin, field by field, is Params of adaattn_cuda/kernels/sm80_attn_fwd.py.
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/work/units.cuh"

namespace adaattn::sm80_attn_fwd {

// Strides are in elements; the last axis of query, key, value and out has stride 1.
struct Params {
    const void* query;             // (batch, heads_q, len_q, dim_qk)
    const void* key;               // (batch, heads_kv, len_kv, dim_qk)
    const void* value;             // (batch, heads_kv, len_kv, dim_v)
    void* out;                     // (batch, heads_q, len_q, dim_v), input type
    float* lse;                    // (batch, heads_q, len_q), natural log
    const unsigned char* allowed;  // (batch, heads_q, len_q, len_kv) bytes, 0 masks; or null
    const void* bias;              // same shape, added to the scaled scores; or null

    i64 query_batch, query_head, query_row;
    i64 key_batch, key_head, key_row;
    i64 value_batch, value_head, value_row;
    i64 out_batch, out_head, out_row;
    i64 lse_batch, lse_head;
    i64 allowed_batch, allowed_head, allowed_row, allowed_key;  // 0 where broadcast
    i64 bias_batch, bias_head, bias_row, bias_key;

    i32 dim_qk, dim_v;
    mask::BiasType bias_type;
    // > 0: scale * log2(e), or with array masks, whose units it has, scale; a softcap takes the
    // scale's place.
    float score_scale;

    work::UnitList work;
};

// For kernels with a rule of softmax/score_rule.cuh.
struct RuledParams : Params {
    const float* sinks;  // one a query head
    float softcap_rate;  // scale / cap
};

// Keys and values that sources other than the caller's arrays read: (rows, dim), contiguous, in the
// input type.
struct FurtherRows {
    const void* key;
    const void* value;
};

// For kernels whose items and sources are in tables (work/work_item.cuh): a block takes an item.
struct ListedParams : Params {
    const work::WorkItem* items;  // gridDim.x of them
    const work::Source* sources;
    FurtherRows further[work::kTensors - 1];  // of kGathered and kPooled
    const float* bias_of_keys;  // added to scaled scores of sources that name a first one; or null
    float inverse_scale;        // 1 / scale, to bring biases to the scores' units
};

}  // namespace adaattn::sm80_attn_fwd
