// smxx_mask_seen.cuh -- which keys any row sees, and which rows see any key, under array masks.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A certificate speaks of what is visible: norms must not count keys that a boolean or
//              additive mask hides from everybody, nor rows that see nothing. One launch looks at
//              the mask of a stretch of sequences. The first blocks take kKeys keys of one KV head:
//              lanes are keys, warps are rows, and the block stops as soon as all its keys have
//              been seen, so only hidden keys cost a walk over all rows of the head's group. The
//              other blocks take kWarps rows of one query head, a warp each, lanes being keys; a
//              warp stops at the first key that its row sees.
//              Source: this project, docs/math/08-composition.md, theorem 8 (visible vectors).
// Numerics     None: a key is hidden by its interval, by a zero of the boolean mask, or by -inf in
//              the additive one; NaN hides nothing. One byte a key and a row: 1 visible, 0 hidden.
// Tiles        kKeys keys, or kWarps rows, a block.
// Shared mem   | seen | i32 | kWarps x kKeys | between the two barriers of a step |
// Registers    One key or row a thread: few.
// Barriers     Two a step of kStep rows: (1) all warps' finds are written before any thread reads
//              them; (2) all have read them before the next step writes.
// Limits       64-bit offsets; lengths <= 2^29 (the host has checked).
// Ladder       none.
//
// Budget: registers<=96 spill_bytes=0 smem_bytes<=2048
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::smxx_mask_seen {

// The twin is _Params of adaattn_cuda/kernels/smxx_mask_seen.py.
struct Params {
    const unsigned char* allowed;  // as in sm80_params.cuh
    const void* bias;
    i64 allowed_batch, allowed_head, allowed_row, allowed_key;
    i64 bias_batch, bias_head, bias_row, bias_key;
    unsigned char* keys;  // (batch, heads_kv, all_kv)
    unsigned char* rows;  // (batch, heads_q, all_q)
    mask::BiasType bias_type;
    i32 heads_q, heads_kv, all_q, all_kv;
    i32 batch_first, q_start, len_q, kv_start, len_kv;  // the stretch
    i32 start_offset, stop_offset;                      // of the interval, as in WorkItem
    i32 heads_alike;                                    // the masks are the same for every head
    i32 key_blocks;                                     // of one KV head
    i32 row_blocks;                                     // of one query head
    i32 key_grid;                                       // blocks that look at keys: the first
};

static_assert(sizeof(Params) == 160, "mirrored by the host");

template <int kKeys_>
struct Traits {
    static constexpr int kKeys = kKeys_;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kStep = 8 * kWarps;  // rows between two looks at what others found
    static constexpr int kSmemBytes = 0;
    static_assert(kKeys == 32, "a lane a key");
};

struct Stretch {
    work::WorkItem item;
    work::Source source;
    ADAATTN_DEVICE Stretch(const Params& params, int batch, int head) : item(), source() {
        item.batch = batch;
        item.head = head;
        item.row_first = params.q_start;
        item.key_stop = params.len_kv;
        item.start_offset = params.start_offset;
        item.stop_offset = params.stop_offset;
        source.first_key = params.kv_start;
    }
};

template <class T>
ADAATTN_DEVICE void look_at_keys(const Params& params, int block) {
    __shared__ int found[T::kWarps][T::kKeys];
    const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    const int unit = block / params.key_blocks;
    const int first_key = block % params.key_blocks * T::kKeys;
    const int batch = params.batch_first + unit / params.heads_kv, head_kv = unit % params.heads_kv;
    const int group = params.heads_q / params.heads_kv;
    const int key = first_key + lane;
    bool seen = key >= params.len_kv;  // nothing to look for
    // Rows whose intervals reach any of these keys.
    const int begin = larger(first_key - params.stop_offset + 1, 0);
    const int end = smaller(first_key + T::kKeys - params.start_offset, params.len_q);
    bool all = false;
    for (int head = 0; head < (params.heads_alike ? 1 : group) && !all; ++head) {
        const Stretch at(params, batch, head_kv * group + head);
        const mask::ArrayMask arrays(params, at.item, at.source);
        for (int first = begin; first < end && !all; first += T::kStep) {
            for (int row = first + warp; row < smaller(first + T::kStep, end) && !seen;
                 row += T::kWarps) {
                seen = mask::visible(at.item, row).holds(key) &&
                       arrays.added(row, key) != -ptx::infinity();
            }
            found[warp][lane] = seen;
            __syncthreads();  // all warps' finds are there
            for (int other = 0; other < T::kWarps; ++other) seen |= found[other][lane] != 0;
            all = !ptx::warp_any(!seen);
            __syncthreads();  // and read, before the next step writes
        }
    }
    if (warp == 0 && key < params.len_kv) {
        const i64 place = static_cast<i64>(batch) * params.heads_kv + head_kv;
        params.keys[place * params.all_kv + params.kv_start + key] = seen;
    }
}

template <class T>
ADAATTN_DEVICE void look_at_rows(const Params& params, int block) {
    const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    const int unit = block / params.row_blocks;
    const int row = block % params.row_blocks * T::kWarps + warp;
    if (row >= params.len_q) return;  // no barrier follows
    const int batch = params.batch_first + unit / params.heads_q, head = unit % params.heads_q;
    const Stretch at(params, batch, head);
    const mask::ArrayMask arrays(params, at.item, at.source);
    const mask::Interval interval = mask::visible(at.item, row);
    bool sees = false;
    for (int first = larger(interval.start, 0); first < interval.stop && !sees; first += 32) {
        const int key = first + lane;
        sees = ptx::warp_any(key < interval.stop && arrays.added(row, key) != -ptx::infinity());
    }
    if (lane == 0) {
        const i64 place = static_cast<i64>(batch) * params.heads_q + head;
        params.rows[place * params.all_q + params.q_start + row] = sees;
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const int block = static_cast<int>(blockIdx.x);
    if (block < params.key_grid) {
        look_at_keys<T>(params, block);
    } else {
        look_at_rows<T>(params, block - params.key_grid);
    }
}

}  // namespace adaattn::smxx_mask_seen
