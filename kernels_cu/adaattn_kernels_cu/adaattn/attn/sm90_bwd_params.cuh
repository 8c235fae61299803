// sm90_bwd_params.cuh -- the one argument of Hopper's backward kernel.
// SPDX-License-Identifier: Apache-2.0
//
// Passed by value as a __grid_constant__, as tensor maps must be. Mirrored field by field in
// adaattn_cuda/kernels/sm90_attn_bwd_f16.py.
#pragma once

#include "adaattn/ptx/tma.cuh"
#include "adaattn/work/units.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

struct Params {
    ptx::TensorMap query_map;  // box: 64 rows x 64 columns
    ptx::TensorMap grad_map;   // of the output's gradient, the same box
    ptx::TensorMap key_map;    // box: 128 rows x 64 columns
    ptx::TensorMap value_map;  // the same
    const float* lse;          // (batch, heads_q, len_q), base 2; +inf where a row sees nothing
    const float* delta;        // the same shape
    float* d_query;            // (batch, heads_q, 2, len_q, kDimQk / 2), added to; chunks of four
                               //   columns lie at their number ^ (row % 8)
    void* d_key;               // contiguous (batch, heads_kv, len_kv, dim), input type
    void* d_value;
    u32* turns;  // kInOrder: (batch, heads_q, 2, len_q), at a tile's first row how many blocks have
                 //   added to it; zeros before
    u32* broken;  // set to 1 where a result is not finite: the whole pass is then done again
    i32 dim_qk, dim_v;
    i32 heads_q, len_q, heads_kv, len_kv;
    i32 group;         // query heads that share a key head
    float scale;       // factor on the scores
    float scale_log2;  // scale * log2(e)
    i32 reserved;
    work::UnitList work;  // as seen from the keys: theirs are the rows
};

static_assert(sizeof(Params) == 3776, "mirrored by the host");

}  // namespace adaattn::sm90_attn_bwd_f16
