// sm80_params.cuh -- what the host hands to the sm80 family: arrays, mask, work.
#pragma once

#include "adaattn/ptx/sm80_ptx.cuh"

namespace adaattn::sm80 {

// A window extent that no length reaches; the host limits lengths to 2^29.
constexpr int kUnlimited = 1 << 30;

// One query tile of one head of one sequence. Rows and keys of a packed (ragged) array begin at
// q_start and kv_start of the batch entry.
struct WorkItem {
    int batch, head, tile, q_start, len_q, kv_start, len_kv, reserved;
};

enum class BiasType : int { kNone = 0, kF32 = 1, kF16 = 2, kBf16 = 3 };

// Strides are in elements; the last axis of query, key, value and out has stride 1.
struct Params {
    const void* query;           // (batch, heads_q, len_q, dim_qk)
    const void* key;             // (batch, heads_kv, len_kv, dim_qk)
    const void* value;           // (batch, heads_kv, len_kv, dim_v)
    void* out;                   // (batch, heads_q, len_q, dim_v), input type
    float* lse;                  // (batch, heads_q, len_q), natural log
    const unsigned char* allowed;  // (batch, heads_q, len_q, len_kv) bytes, 0 masks; or null
    const void* bias;            // same shape, added to the scaled scores; or null
    const WorkItem* items;       // gridDim.x items, or null: every tile of every head

    i64 query_batch, query_head, query_row;
    i64 key_batch, key_head, key_row;
    i64 value_batch, value_head, value_row;
    i64 out_batch, out_head, out_row;
    i64 lse_batch, lse_head;
    i64 allowed_batch, allowed_head, allowed_row, allowed_key;  // 0 where broadcast
    i64 bias_batch, bias_head, bias_row, bias_key;

    int batch, heads_q, group_size, len_q, len_kv, dim_qk, dim_v;
    int left, right;       // a row at position p sees keys p-left .. p+right
    int bottom_right;      // 1: position = row + len_kv - len_q, 0: position = row
    BiasType bias_type;
    float scale_log2;      // scale * log2(e), > 0
};

// Item of this block. Without a list, heads run fastest (neighbours share keys in L2) and the last
// query tile comes first: under a causal mask it is the longest.
ADAATTN_DEVICE WorkItem work_item(const Params& params, int tile_m) {
    if (params.items != nullptr) {
        return params.items[block_index()];
    }
    const int heads = params.heads_q;
    const int tiles = (params.len_q + tile_m - 1) / tile_m;
    const int linear = static_cast<int>(block_index());
    const int rest = linear / heads;
    WorkItem item;
    item.head = linear % heads;
    item.batch = rest % params.batch;
    item.tile = tiles - 1 - rest / params.batch;
    item.q_start = 0;
    item.len_q = params.len_q;
    item.kv_start = 0;
    item.len_kv = params.len_kv;
    item.reserved = 0;
    return item;
}

}  // namespace adaattn::sm80
