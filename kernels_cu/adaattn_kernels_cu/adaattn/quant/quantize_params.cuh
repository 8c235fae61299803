// quantize_params.cuh -- what the quantiser is given. SPDX-License-Identifier: Apache-2.0
//
// Mirrored field by field in adaattn_cuda/kernels/smxx_quantize.py.
#pragma once

#include "adaattn/common/format.cuh"

namespace adaattn::smxx_quantize {

enum Part : int { kCentres = 0, kCodes = 1 };

constexpr int kSamples = 64;  // keys that a centre is made from
constexpr int kGroups = 4;
constexpr float kTiny = 1e-30f;  // an all-zero group must not give 0 / 0
constexpr float kKeyLimit = 127.0f, kValueLimit = 448.0f;

// (batch, head, row, dim) with unit stride along dim; strides in elements.
struct Rows {
    const void* data;
    i64 batch;
    i64 head;
    i64 row;
};

// A sequence's visible keys, as rows of the arrays.
struct Span {
    i32 batch;
    i32 low;
    i32 high;
    i32 reserved;
};

// 256 rows of a sequence, of which begin .. end - 1 count.
struct Tile {
    i32 batch;
    i32 first;  // row in the arrays
    i32 begin;
    i32 end;
    i32 place;  // row among the codes
    i32 span;
    i32 head;
    i32 reserved;
};

struct Params {
    Rows query;
    Rows key;
    Rows value;
    const Span* spans;
    const Tile* key_tiles;
    const Tile* query_tiles;
    u32* query_codes;     // (batch, heads_q, len_q, kDimQk) bytes
    u32* key_codes;       // (batch, heads_kv, rows_kv, kDimQk) bytes
    u32* value_codes;     // (batch, heads_kv, kDimV, rows_kv) bytes
    float* query_scales;  // (batch, heads_q, len_q), and so is
    float* lse_shift;
    float* tile_scales;  // (batch, heads_kv, rows_kv / kTileKeys, kTileScales)
    float* centres;      // (spans, heads_kv, kDimQk)
    i32 heads_q;
    i32 heads_kv;
    i32 len_q;
    i32 rows_kv;
    i32 key_tile_count;
    i32 query_tile_count;
    i32 dim_qk;
    i32 dim_v;
    float scale;
    i32 smooth;
    const i32* decision;  // (batch, heads_q): heads of -1 are wanted; null: all
};

static_assert(sizeof(Params) == 224, "mirrored by the host");

}  // namespace adaattn::smxx_quantize
