// decode_params.cuh -- what smxx_attn_decode is told. SPDX-License-Identifier: Apache-2.0
//
// The twins are in adaattn_cuda/kernels/smxx_attn_decode.py; a test compares the sizes.
#pragma once

#include "adaattn/common/format.cuh"

namespace adaattn::smxx_attn_decode {

// How the numbers of narrow pages are coded: adaattn_core.pages.
enum class Code : int { i8, e4m3 };

// A pool of narrow pages. vector = unit * (centre + reach * code * 2^-7 (i8) or 2^-9 (e4m3)).
struct NarrowPool {
    const void* data;   // (pages, page_len, dim) bytes
    const float* unit;  // (pages)
    const u16* centre;  // (pages, dim), f16
    const u16* reach;   // (pages, dim), f16
};

struct Params {
    const void* query;
    void* out;
    float* lse;       // (batch, heads_q, len_q)
    float* dropped;   // the same: share of the row's mass whose values were not read; or null
    const void* key;  // wide pages, (pages, page_len, dim)
    const void* value;
    NarrowPool key_narrow;
    NarrowPool value_narrow;
    const i32* table;    // entry n >= 0: narrow page n; -1 - n: wide page n
    const i32* lengths;  // keys starts[b] .. lengths[b] - 1 of sequence b are visible
    const i32* starts;
    float* partials;  // (units, splits, columns, dim), then (units, splits, columns, 3)
    u32* arrivals;    // (units), 0 before and after every launch
    i64 query_batch, query_head, query_row;  // strides in elements, of out as well below
    i64 out_batch, out_head, out_row;
    i64 table_batch, table_head;
    i32 heads_kv;
    i32 group;        // query heads of a key/value head
    i32 len_q;        // rows of a head: those of the newest keys, the last one last
    i32 page_chunks;  // page_len / 64
    i32 splits;       // blocks that share a unit's keys
    i32 row_tiles;    // blocks that share a head's rows
    i32 units;        // batch * heads_kv * row_tiles
    i32 causal;
    i32 left;          // a row at position p sees keys p - left and later; -1: all
    float scale_log2;  // scale * log2(e)
    float skip_share;  // of a row's mass, below which the values of 64 keys need not be read
};

static_assert(sizeof(Params) == 264, "mirrored by the host");

}  // namespace adaattn::smxx_attn_decode
