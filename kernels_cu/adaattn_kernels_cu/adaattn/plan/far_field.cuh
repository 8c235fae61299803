// far_field.cuh -- what the planning kernels share: sizes, tables and addresses of one adaptive call. SPDX-License-Identifier: Apache-2.0
//
// Vocabulary. A *tile* is the query rows of one work item; its *near field* are the exact keys [near_first, near_stop). Tiles are
// cut into *groups*; what lies before a tile's near field is its *far field*, which a group represents by *landmarks* (single
// keys, gathered) and *pools* (one weighted average per block of 64 keys). How much softmax mass a far key carries was measured
// on a few *sampled rows* of the group and is kept as one byte, a *code* (mass_of). A *level* is one landmark mass of the ladder.
// Mirrored field by field in adaattn_cuda/work/far.py.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::far {

constexpr int kPoolKeys = 64;  // keys of a pool
constexpr int kSlotRows =
    128;  // slots of landmarks and of pools are whole key tiles: what fills them up is zero
constexpr int kLevelsMax = 8;       // landmark masses of the ladder
constexpr int kJudgesMax = 2;       // tiles of a head that judge the ladder
constexpr int kJudgeParts = 4;      // items at most that share the landmarks of a judged tile
constexpr int kCodesPerOctave = 8;  // resolution of a mass code
constexpr float kSmallestMassLog2 = -26.0f;
constexpr int kDenseLevel = -1;  // Decision of a head that has no far field
constexpr int kWideLevel = -2;   // the same, where such heads run in 8 bits, of one that does not

// One group of query tiles.
struct Group {
    i32 tile_first;  // first tile
    i32 tiles;       // how many
    i32 far_keys;    // keys before the near field of its last tile: a multiple of kPoolKeys
    i32 pool_first;  // first row of its pools among those of a head
};

// A (batch, head, row, dim) array of 16-bit elements; strides in elements.
struct Rows {
    const void* data;
    i64 stride_row;
    i64 stride_head;
    i64 stride_batch;

    ADAATTN_DEVICE const u16* at(int batch, int head, int row) const {
        return static_cast<const u16*>(data) + batch * stride_batch + head * stride_head +
               row * stride_row;
    }
};

// Landmarks of one level in one group of one head.
struct Selection {
    i32 threshold;  // keys with at least this code are landmarks
    i32 count;
};

struct Sizes {
    i32 batch;
    i32 heads_q;
    i32 heads_kv;
    i32 len_q;
    i32 len_kv;
    i32 offset;  // a causal row r sees keys up to r + offset
    i32 causal;
    i32 dim_qk;
    i32 dim_v;
    i32 tile;           // query rows of a tile
    i32 tiles;          // of a head
    i32 band;           // keys of the near field before a tile, a multiple of kPoolKeys
    i32 groups;         // of a head
    i32 samples;        // rows of a group and head that are probed
    i32 levels;         // of the ladder
    i32 judges;         // judged tiles of a head
    i32 code_stride;    // bytes from one group's codes to the next
    i32 pool_rows;      // rows of all pools of a head
    i32 split_keys;     // keys that one block probes, a multiple of the probe's key tile
    i32 splits;         // blocks that share a group's keys
    float scale_log2;   // scale log2(e)
    i32 landmark_rows;  // room in the landmark buffer, in rows

    ADAATTN_DEVICE int near_first(int tile_index) const {
        const int first = causal ? tile_index * tile + offset - band : len_kv;
        return first <= 0 ? 0 : first / kPoolKeys * kPoolKeys;
    }
    ADAATTN_DEVICE int near_stop(int tile_index) const {
        return causal ? smaller(len_kv, tile_index * tile + tile + offset) : len_kv;
    }
    // Keys that a row sees.
    ADAATTN_DEVICE int visible(int row) const {
        return causal ? smaller(len_kv, row + offset + 1) : len_kv;
    }
};

// The middle of a code's interval. Code 0 stands for everything below the smallest mass.
ADAATTN_DEVICE float mass_of(int code) {
    return exp2f((static_cast<float>(code) + 0.5f) * (1.0f / kCodesPerOctave) + kSmallestMassLog2);
}

ADAATTN_DEVICE int code_of(float mass) {
    const float code = (__log2f(mass) - kSmallestMassLog2) * kCodesPerOctave;
    return mass > 0.0f ? static_cast<int>(fminf(fmaxf(code, 0.0f), 255.0f)) : 0;
}

}  // namespace adaattn::far
