// sm90_params.cuh -- the one argument of the sm90 attention kernels.
// SPDX-License-Identifier: Apache-2.0
//
// Passed by value as a __grid_constant__, as tensor maps must be. Mirrored field by field in
// adaattn_cuda/kernels/sm90_attn_fwd_f16.py.
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn {

// A (batch, head, row, dim) array with unit stride along dim; strides in elements.
struct Matrix {
    const void* data;
    i64 stride_row;
    i64 stride_head;
    i64 stride_batch;

    ADAATTN_DEVICE i64 offset(int batch, int head, int row) const {
        return batch * stride_batch + head * stride_head + row * stride_row;
    }
};

// What a specialisation is for.
enum Role : int {
    kDense = 0,     // a list of the host, dealt to the blocks
    kAdaptive = 1,  // a list of a planning kernel; per-key biases; partial results
    kExactRows =
        2  // rows drawn anywhere, each with its own limit; unrounded weights; partial results
};

struct AttentionParams {
    ptx::TensorMap query_map;                  // box: tile_m rows x 64 columns
    ptx::TensorMap key_map[work::kTensors];    // box: tile_n rows x 64 columns
    ptx::TensorMap value_map[work::kTensors];  // box: tile_n rows x 64 columns
    Matrix query;                              // the same arrays for the scalar path
    Matrix key[work::kTensors];
    Matrix value[work::kTensors];
    Matrix out;
    Matrix lse;                   // f32, (batch, head, row); dim does not exist
    const work::WorkItem* items;  // (rounds, gridDim.x)
    const work::Source* sources;  // the table that items point into
    const float* bias;            // per-key addends to the scaled scores, or null
    work::Queue* queue;           // of a planning kernel: items are taken in order; null: dealt
    const i32* row_stops;  // kExactRows: row r sees keys before row_stops[item.row_stops + r]
    float* partial_out;    // (partials, tile_m, dim_v) and (partials, tile_m)
    float* partial_lse;
    float* squares;       // kAdaptive: sums of squares of 16 output rows each
    float inverse_scale;  // 1 / scale, to bring biases to the raw scores' units
    float scale_log2;     // scale log2(e) > 0; with a softcap, cap log2(e)
    float slack;          // softmax::kSlackLog2 / scale_log2
    i32 rounds;
    i32 dim_qk;
    i32 dim_v;
    i32 squares_head;  // places from one head's squares to the next, and from one batch entry's
    i32 squares_batch;
    // kAdaptive, one a head: scores whose tiles were skipped, and most keys that a row skipped.
    u64* skipped;
    u32* skipped_most;
    // kDense with a rule of softmax/score_rule.cuh.
    const float* sinks;  // one a query head
    float softcap_rate;  // scale / cap
};

static_assert(sizeof(AttentionParams) == 1344, "mirrored by the host");

}  // namespace adaattn
