// sm80_params.cuh -- what the host hands to the sm80 family: arrays, mask, work.
#pragma once

#include "adaattn/ptx/sm80_ptx.cuh"

namespace adaattn::sm80 {

// A window extent that no length reaches; the host limits lengths to 2^29.
constexpr int kUnlimited = 1 << 30;

// One sequence (all its heads), or one head of one sequence. Rows and keys of a packed (ragged)
// array begin at q_start and kv_start of the batch entry.
struct Unit {
    int batch, head, q_start, len_q, kv_start, len_kv;
};

// Units travel in the parameters: no memory to allocate, to fill in time, or to free too early. A
// longer list takes several launches.
constexpr int kMaxUnits = 128;

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

    int tiles;             // query tiles of the longest unit
    int heads_per_unit;    // heads_q, or 1 where every unit names its head
    int unit_count;        // 0: every batch entry, whole
    Unit units[kMaxUnits];
};

// One query tile of one head of one sequence: what a block computes.
struct WorkItem {
    int batch, head, tile, q_start, len_q, kv_start, len_kv;
};

// Item of this block. Heads run fastest (neighbours share keys in L2) and the last query tile comes
// first: under a causal mask it is the longest. Beyond a shorter unit's end, tile * tile_m >= len_q.
ADAATTN_DEVICE WorkItem work_item(const Params& params) {
    const int units = params.unit_count > 0 ? params.unit_count : params.batch;
    const int linear = static_cast<int>(block_index());
    const int rest = linear / params.heads_per_unit;
    const int head = linear % params.heads_per_unit;
    const int index = rest % units;
    const int tile = params.tiles - 1 - rest / units;
    if (params.unit_count == 0) {
        return {index, head, tile, 0, params.len_q, 0, params.len_kv};
    }
    const Unit& unit = params.units[index];
    return {unit.batch, unit.head + head, tile,       unit.q_start,
            unit.len_q, unit.kv_start,    unit.len_kv};
}

}  // namespace adaattn::sm80
