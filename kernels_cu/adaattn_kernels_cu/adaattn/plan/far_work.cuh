// far_work.cuh -- work lists written on the device: items and sources of the forward kernel, longest first, and the places of the
// gathered landmarks. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block. 1. Slots (a group of a head at a level) get consecutive rows of the landmark buffer, by a prefix sum over
//              their counts; what does not fit is not offered (judging) or makes its head dense (attending). 2. Items are counted
//              by their number of key tiles in 256 buckets. 3. Every item goes to its bucket's next place, with its sources.
//              kJudge: the judged tiles at every possible level, into partial slots.
//              kAttend: all tiles of all heads: dense heads whole, the others as near field + landmarks + pools, but for the last
//              `tail` tiles, which are exact.
//              kEscalate: all tiles of the heads whose certificate failed, exactly.
// Numerics     Integers. The order within a bucket is free: items do not depend on each other.
// Tiles        1,024 threads.
// Shared mem   buckets: i32, 256; warp sums: i32, 32.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=8192
// Limits       items below 2^31 / 3.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::far_work {

enum Mode : i32 { kJudge = 0, kAttend = 1, kEscalate = 2 };

// Counters that a forward launch and the next list share.
struct Queue {
    i32 next;   // the next item to be taken; 0 before a launch
    i32 items;  // how many there are
    i32 reserved[2];
};

struct Params {
    far::Sizes sizes;
    const far::Group* groups;
    const i32* judge_tiles;
    const i32* judge_groups;
    const far::Selection* selections;
    const i32* tile_counts;
    i32* decision;      // (batch, heads_q)
    const i32* failed;  // (batch, heads_q): kEscalate takes the heads that are not 0
    far_gather::Slot*
        slots;  // kJudge: (batch, heads_q, judges, levels); kAttend: (batch, heads_q, groups)
    const i32* pool_first;  // of the same shape
    work::WorkItem* items;
    work::Source* sources;  // three places an item
    Queue* queue;
    u64* kept;  // (batch, heads_q): scores computed
    i32 tile_stride;
    i32 tile_n;        // keys of a tile of the forward kernel
    float most_share;  // landmarks of a level over the far keys, above which it is not judged
    i32 tail;          // last tiles of a head that are exact
};

template <int kModeT>
struct Traits {
    static constexpr int kMode = kModeT;
    static constexpr int kThreads = 1024;
    static constexpr int kSmemBytes = 0;
};

// What one item will be.
struct Draft {
    i32 head;  // of batch * heads_q
    i32 tile;  // query tile
    i32 slot;  // kNoSlot: exact
    i32 landmarks;
    i32 partial;
    i32 tiles;  // key tiles; 0: no item
};
constexpr i32 kNoSlot = -1;

template <class T>
struct Block {
    const Params& params;
    int* buckets;    // 256
    int* warp_sums;  // 32

    // Prefix sum over the block of one number a thread; `total` is the same everywhere.
    ADAATTN_DEVICE int before(int own, int& total) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        int sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(kFullWarp, sum, step);
            if (lane >= step) sum += other;
        }
        __syncthreads();
        if (lane == 31) warp_sums[warp] = sum;
        __syncthreads();
        total = 0;
        int earlier = 0;
        for (int w = 0; w < T::kThreads / kWarpThreads; ++w) {
            if (w == warp) earlier = total;
            total += warp_sums[w];
        }
        return earlier + sum - own;
    }

    ADAATTN_DEVICE int slot_count() const {
        const far::Sizes& sizes = params.sizes;
        const int heads = sizes.batch * sizes.heads_q;
        return T::kMode == kJudge ? heads * sizes.judges * sizes.levels : heads * sizes.groups;
    }

    ADAATTN_DEVICE far_gather::Slot slot_of(int index) const {
        const far::Sizes& sizes = params.sizes;
        far_gather::Slot slot;
        if constexpr (T::kMode == kJudge) {
            slot.level = index % sizes.levels;
            slot.group = params.judge_groups[index / sizes.levels % sizes.judges];
            slot.head = index / sizes.levels / sizes.judges;
        } else {
            slot.head = index / sizes.groups;
            slot.group = index % sizes.groups;
            slot.level = params.decision[slot.head];
        }
        slot.row_first = 0;
        return slot;
    }

    ADAATTN_DEVICE const far::Selection& selection(const far_gather::Slot& slot) const {
        const i64 row = static_cast<i64>(slot.head) * params.sizes.groups + slot.group;
        return params.selections[row * far::kLevelsMax + slot.level];
    }

    ADAATTN_DEVICE int landmarks_before(const far_gather::Slot& slot, int tile) const {
        const i64 row = static_cast<i64>(slot.head) * params.sizes.groups + slot.group;
        return params.tile_counts[(row * far::kLevelsMax + slot.level) * params.tile_stride + tile -
                                  params.groups[slot.group].tile_first];
    }

    // Step 1.
    ADAATTN_DEVICE void place_slots() const {
        int done = 0;
        for (int first = 0; first < slot_count(); first += T::kThreads) {
            const int index = first + static_cast<int>(threadIdx.x);
            int wanted = 0;
            far_gather::Slot slot = {};
            slot.head = -1;
            if (index < slot_count()) {
                slot = slot_of(index);
                const int far_keys = params.groups[slot.group].far_keys;
                if (far_keys == 0 || slot.level < 0) {
                    slot.head = -1;
                } else {
                    wanted = selection(slot).count;
                    if (T::kMode == kJudge &&
                        static_cast<float>(wanted) >
                            params.most_share * static_cast<float>(far_keys)) {
                        wanted = 0;
                        slot.head = -1;
                    }
                }
            }
            int total;
            slot.row_first = done + before(round_up(wanted, far::kSlotRows), total);
            done += total;
            if (slot.head >= 0 && slot.row_first + wanted > params.sizes.landmark_rows) {
                if constexpr (T::kMode == kAttend) params.decision[slot.head] = far::kDenseLevel;
                slot.head = -1;
            }
            if (index < slot_count()) params.slots[index] = slot;
        }
        __syncthreads();
    }

    ADAATTN_DEVICE int draft_count() const {
        const far::Sizes& sizes = params.sizes;
        const int heads = sizes.batch * sizes.heads_q;
        return T::kMode == kJudge ? heads * sizes.judges * sizes.levels : heads * sizes.tiles;
    }

    ADAATTN_DEVICE Draft draft(int index) const {
        const far::Sizes& sizes = params.sizes;
        Draft out = {0, 0, kNoSlot, 0, work::kNoPartial, 0};
        if constexpr (T::kMode == kJudge) {
            out.head = index / sizes.levels / sizes.judges;
            out.tile = params.judge_tiles[index / sizes.levels % sizes.judges];
            out.slot = out.partial = index;
        } else {
            out.head = index / sizes.tiles;
            out.tile = index % sizes.tiles;
            if constexpr (T::kMode == kEscalate) {
                if (params.failed[out.head] == 0) return out;
            } else if (params.decision[out.head] >= 0 && out.tile < sizes.tiles - params.tail) {
                const int tiles_per_group = params.groups[0].tiles;
                out.slot = out.head * sizes.groups + out.tile / tiles_per_group;
            }
        }
        const int first = sizes.near_first(out.tile);
        const int stop = sizes.near_stop(out.tile);
        const int dense = ceil_div(larger(stop, 1), params.tile_n);
        if (out.slot != kNoSlot && first == 0) out.slot = kNoSlot;  // all is near
        if (out.slot == kNoSlot) {
            out.tiles = dense;
            return out;
        }
        const far_gather::Slot slot = params.slots[out.slot];
        if (slot.head < 0) {
            if constexpr (T::kMode == kJudge) return out;  // not offered
            out.slot = kNoSlot;
            out.tiles = dense;
            return out;
        }
        out.landmarks = landmarks_before(slot, out.tile);
        out.tiles = ceil_div(stop - first, params.tile_n) + ceil_div(out.landmarks, params.tile_n) +
                    ceil_div(first / far::kPoolKeys, params.tile_n);
        if (T::kMode == kAttend && out.tiles >= dense) {
            out.slot = kNoSlot;
            out.tiles = dense;
        }
        return out;
    }

    ADAATTN_DEVICE int bucket(int tiles) const {
        const int most = ceil_div(params.sizes.len_kv, params.tile_n) + 3;
        return 255 - smaller(255, static_cast<int>(static_cast<i64>(tiles) * 255 / most));
    }

    // Scores that rows of a tile compute with the keys from `first` on.
    ADAATTN_DEVICE u64 scores_from(int tile, int rows, int first) const {
        const far::Sizes& sizes = params.sizes;
        if (!sizes.causal) return static_cast<u64>(rows) * static_cast<u64>(sizes.len_kv - first);
        u64 sum = 0;
        const int low = sizes.visible(tile * sizes.tile) -
                        first;  // of the first row; each further row sees one more
        sum = static_cast<u64>(rows) * static_cast<u64>(larger(low, 0)) +
              static_cast<u64>(rows) * static_cast<u64>(rows - 1) / 2;
        return sum;
    }

    ADAATTN_DEVICE void write(int place, const Draft& own) const {
        const far::Sizes& sizes = params.sizes;
        const int first = own.slot == kNoSlot ? 0 : sizes.near_first(own.tile);
        const int stop = sizes.near_stop(own.tile);
        const int row_first = own.tile * sizes.tile;
        work::WorkItem item = {};
        item.batch = own.head / sizes.heads_q;
        item.head = own.head % sizes.heads_q;
        item.row_first = row_first;
        item.rows = smaller(sizes.tile, sizes.len_q - row_first);
        item.first_source = 3 * place;
        item.tiles = own.tiles;
        item.partial = own.partial;
        item.key_start = 0;
        item.key_stop = sizes.len_kv;
        item.start_offset = -work::kUnlimited;
        item.stop_offset = sizes.causal ? row_first + sizes.offset + 1 : work::kUnlimited;
        item.heads = 1;
        work::Source* to = params.sources + 3 * place;
        int sources = 0;
        if (own.slot != kNoSlot) {
            work::Source pools = {};
            pools.tensor = work::kPooled;
            pools.first_key = params.pool_first[own.slot];
            pools.keys = first / far::kPoolKeys;
            pools.first_bias = pools.first_key;
            to[sources++] = pools;
            if (own.landmarks > 0) {
                work::Source landmarks = {};
                landmarks.tensor = work::kGathered;
                landmarks.first_key = params.slots[own.slot].row_first;
                landmarks.keys = own.landmarks;
                landmarks.first_bias = work::kNoBias;
                to[sources++] = landmarks;
            }
        }
        if (stop > first || sources == 0) {
            work::Source near = {};
            near.tensor = work::kOriginal;
            near.batch = item.batch;
            near.head = item.head / (sizes.heads_q / sizes.heads_kv);
            near.first_key = first;
            near.keys = larger(stop - first, 1);
            near.position = first;
            near.mask = work::kMaskInterval;
            near.first_bias = work::kNoBias;
            to[sources++] = near;
        }
        item.sources = sources;
        params.items[place] = item;
        if constexpr (T::kMode != kJudge) {
            const u64 far_scores =
                own.slot == kNoSlot ? 0
                                    : static_cast<u64>(item.rows) *
                                          static_cast<u64>(own.landmarks + first / far::kPoolKeys);
            atomicAdd(params.kept + own.head, far_scores + scores_from(own.tile, item.rows, first));
        }
    }

    ADAATTN_DEVICE void run() const {
        const int thread = static_cast<int>(threadIdx.x);
        for (int i = thread; i < 256; i += T::kThreads) buckets[i] = 0;
        if constexpr (T::kMode == kAttend) {
            for (int i = thread; i < params.sizes.batch * params.sizes.heads_q; i += T::kThreads) {
                params.kept[i] = 0;
            }
        }
        __syncthreads();
        if constexpr (T::kMode != kEscalate) place_slots();
#pragma unroll 4
        for (int i = thread; i < draft_count(); i += T::kThreads) {
            const Draft own = draft(i);
            if (own.tiles > 0) atomicAdd(buckets + bucket(own.tiles), 1);
        }
        __syncthreads();
        int total;
        const int mine = thread < 256 ? buckets[thread] : 0;
        const int first = before(mine, total);
        __syncthreads();
        if (thread < 256) buckets[thread] = first;
        __syncthreads();
        for (int i = thread; i < draft_count(); i += T::kThreads) {
            const Draft own = draft(i);
            if (own.tiles > 0) write(atomicAdd(buckets + bucket(own.tiles), 1), own);
        }
        if (thread == 0) {
            work::WorkItem end = {};
            params.items[total] = end;
            params.queue->next = 0;
            params.queue->items = total;
        }
    }
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int buckets[256];
    __shared__ int warp_sums[32];
    Block<T> block{params, buckets, warp_sums};
    block.run();
}

}  // namespace adaattn::far_work
