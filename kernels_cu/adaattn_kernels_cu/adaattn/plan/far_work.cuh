// far_work.cuh -- places of the gathered landmarks, and which heads are on which work list. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block. 1. Slots (a group of a head at a level) get consecutive rows of the landmark buffer, by a prefix sum over
//              their counts; what does not fit is not offered (judging) or makes its head dense (attending). Nor is a level
//              offered that would cost too much. A judged tile's levels share the rows of the first of them (far_nest).
//              kJudge: 2. items of the judged tiles at every possible level, into partial slots, up to four a slot where there are
//              many landmarks: counted by their number of key tiles in 256 buckets, longest first; the order within a bucket
//              is free, items do not depend on each other.
//              kAttend: 2. heads are ranked on lists, those that run by landmarks, those that are exact, and those of them that
//              run in 8 bits first; far_list writes the items.
// Numerics     Integers; mean landmarks in f32.
// Tiles        1,024 threads.
// Shared mem   buckets: i32, 256; warp sums: i32, 32.
// Budget: registers<=64 spill_bytes=0 smem_bytes<=8192
// Limits       items below 2^31 / 3.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/plan/far_items.cuh"

namespace adaattn::far_work {

enum Mode : i32 { kJudge = 0, kAttend = 1 };

struct Params {
    far::Sizes sizes;
    const far::Group* groups;
    const i32* judge_tiles;
    const i32* judge_groups;
    const far::Selection* selections;
    const i32* tile_counts;
    i32* decision;  // (batch, heads_q)
    far_gather::Slot*
        slots;  // kJudge: (batch, heads_q, judges, levels); kAttend: (batch, heads_q, groups)
    const i32* pool_first;  // of the same shape
    i32* parts;             // kJudge: (batch, heads_q, judges, levels): items of a slot
    far::List landmarks;    // kJudge: its items
    far::List exact;        // kAttend
    far::List narrow;       // kAttend: dense heads in 8 bits; without places where none run so
    u64* kept;              // (batch, heads_q): scores computed by landmark heads; 0 from here on
    i32 tile_stride;
    float most_landmarks;  // of a far tile in the mean, above which a level is not judged
    float judge_weights[far::kJudgesMax];  // of the judged groups' landmarks in that mean
    i32 section_heads;                     // key heads whose keys and values L2 holds together
    i32 part_tiles;  // kJudge: key tiles of landmarks of an item but a slot's last
    i32 padding;
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
    i32 part;  // the first one has pools and near field, too
    i32 landmark_first;
    i32 landmarks;
    i32 tiles;  // key tiles; 0: no item
};

template <class T>
struct Block {
    const Params& params;
    int* buckets;    // 256
    int* warp_sums;  // 32

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

    // Landmarks of a far tile in the mean, at a level.
    ADAATTN_DEVICE float landmarks_of(const far_gather::Slot& slot, int level) const {
        const far::Sizes& sizes = params.sizes;
        float mean = 0.0f;
        for (int j = 0; j < sizes.judges; ++j) {
            const i64 row = static_cast<i64>(slot.head) * sizes.groups + params.judge_groups[j];
            mean += params.judge_weights[j] *
                    static_cast<float>(params.selections[row * far::kLevelsMax + level].count);
        }
        return mean;
    }

    // kJudge: the first level that is worth judging, and all after it are, which have fewer landmarks.
    ADAATTN_DEVICE int first_offered(const far_gather::Slot& slot) const {
        int level = 0;
        while (level < params.sizes.levels && landmarks_of(slot, level) > params.most_landmarks)
            ++level;
        return level;
    }

    // kJudge: landmarks before the near field of a slot's tile, at a level.
    ADAATTN_DEVICE int tile_count(int index, int level) const {
        const far::Sizes& sizes = params.sizes;
        const int judge = index / sizes.levels % sizes.judges;
        const int group = params.judge_groups[judge];
        const i64 row =
            static_cast<i64>(index / sizes.levels / sizes.judges) * sizes.groups + group;
        return params.tile_counts[(row * far::kLevelsMax + level) * params.tile_stride +
                                  params.judge_tiles[judge] - params.groups[group].tile_first];
    }

    // Step 1.
    ADAATTN_DEVICE void place_slots() const {
        const far::Sizes& sizes = params.sizes;
        int done = 0;
        for (int first = 0; first < slot_count(); first += T::kThreads) {
            const int index = first + static_cast<int>(threadIdx.x);
            int wanted = 0;
            bool taken = true;  // whether these rows are counted for this slot
            far_gather::Slot slot = {};
            slot.head = -1;
            if (index < slot_count()) {
                slot = slot_of(index);
                const int far_keys = params.groups[slot.group].far_keys;
                if (far_keys == 0 || slot.level < 0) {
                    slot.head = -1;
                } else {
                    const i64 row = static_cast<i64>(slot.head) * sizes.groups + slot.group;
                    wanted = params.selections[row * far::kLevelsMax + slot.level].count;
                    if constexpr (T::kMode == kJudge) {
                        const int most = first_offered(slot);
                        wanted = most < sizes.levels ? tile_count(index, most) : 0;
                        taken = slot.level == sizes.levels - 1;  // the tile's last slot
                        if (slot.level < most) slot.head = -1;
                    }
                }
            }
            int total;
            slot.row_first =
                done + far::block_before<T::kThreads>(taken ? round_up(wanted, far::kSlotRows) : 0,
                                                      total, warp_sums);
            done += total;
            if (slot.head >= 0 && slot.row_first + wanted > sizes.landmark_rows) {
                if constexpr (T::kMode == kAttend) params.decision[slot.head] = far::kDenseLevel;
                slot.head = -1;
            }
            if (index < slot_count()) params.slots[index] = slot;
        }
        __syncthreads();
    }

    ADAATTN_DEVICE Draft draft(int index, int part) const {
        const far::Sizes& sizes = params.sizes;
        Draft out = {index / sizes.levels / sizes.judges,
                     params.judge_tiles[index / sizes.levels % sizes.judges],
                     part,
                     0,
                     0,
                     0};
        const far_gather::Slot slot = params.slots[index];
        if (slot.head < 0) return out;  // not offered
        const int first = sizes.near_first(out.tile);
        const int tile_n = params.landmarks.tile_n;
        const int all = tile_count(index, slot.level);
        out.landmark_first = part * params.part_tiles * tile_n;
        const int left = larger(all - out.landmark_first, 0);
        const bool whole = part == far::kJudgeParts - 1;  // the last part takes what is left
        out.landmarks = whole ? left : smaller(left, params.part_tiles * tile_n);
        out.tiles = ceil_div(out.landmarks, tile_n);
        if (part == 0)
            out.tiles += ceil_div(sizes.near_stop(out.tile) - first, tile_n) +
                         ceil_div(first / far::kPoolKeys, tile_n);
        return out;
    }

    ADAATTN_DEVICE int bucket(int tiles) const {
        const int most = ceil_div(params.sizes.len_kv, params.landmarks.tile_n) + 3;
        return 255 - smaller(255, static_cast<int>(static_cast<i64>(tiles) * 255 / most));
    }

    ADAATTN_DEVICE void write(int index, int number, const Draft& own) const {
        const far::Sizes& sizes = params.sizes;
        work::WorkItem item =
            far::item_of(sizes, own.head, own.tile * sizes.tile, sizes.tile, number, own.tiles);
        item.partial = index * far::kJudgeParts + own.part;
        const int first = own.part == 0 ? sizes.near_first(own.tile) : 0;
        const int stop = own.part == 0 ? sizes.near_stop(own.tile) : 0;
        item.sources = far::sources_of(sizes, item, first, stop, params.pool_first[index],
                                       params.slots[index].row_first + own.landmark_first,
                                       own.landmarks, params.landmarks.sources + 3 * number);
        params.landmarks.items[number] = item;
    }

    // Step 2 of kJudge.
    ADAATTN_DEVICE void list_judged() const {
        const int thread = static_cast<int>(threadIdx.x);
        for (int i = thread; i < 256; i += T::kThreads) buckets[i] = 0;
        __syncthreads();
        for (int i = thread; i < slot_count(); i += T::kThreads) {
            int parts = 0;
            for (int part = 0; part < far::kJudgeParts; ++part) {
                const Draft own = draft(i, part);
                if (own.tiles == 0) break;
                atomicAdd(buckets + bucket(own.tiles), 1);
                ++parts;
            }
            params.parts[i] = parts;
        }
        __syncthreads();
        int total;
        const int mine = thread < 256 ? buckets[thread] : 0;
        const int first = far::block_before<T::kThreads>(mine, total, warp_sums);
        if (thread < 256) buckets[thread] = first;
        __syncthreads();
        for (int i = thread; i < slot_count(); i += T::kThreads) {
            for (int part = 0; part < params.parts[i]; ++part) {
                const Draft own = draft(i, part);
                write(i, atomicAdd(buckets + bucket(own.tiles), 1), own);
            }
        }
        if (thread == 0) {
            const work::WorkItem end = {};
            params.landmarks.items[total] = end;
            params.landmarks.queue->next = 0;
            params.landmarks.queue->items = total;
        }
    }

    // Step 2 of kAttend.
    ADAATTN_DEVICE void rank() const {
        const far::Sizes& sizes = params.sizes;
        const int heads = sizes.batch * sizes.heads_q;
        for (int i = static_cast<int>(threadIdx.x); i < heads; i += T::kThreads) params.kept[i] = 0;
        const i32* decision = params.decision;
        far::rank_heads<T::kThreads>(
            sizes, params.landmarks, params.section_heads,
            [=](int head) { return decision[head] >= 0; }, warp_sums);
        const bool narrow = params.narrow.places != nullptr;
        const int most = narrow ? far::kWideLevel : far::kDenseLevel;
        far::rank_heads<T::kThreads>(
            sizes, params.exact, params.section_heads,
            [=](int head) { return decision[head] <= most; }, warp_sums);
        if (!narrow) return;
        far::rank_heads<T::kThreads>(
            sizes, params.narrow, params.section_heads,
            [=](int head) { return decision[head] == far::kDenseLevel; }, warp_sums);
    }
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int buckets[256];
    __shared__ int warp_sums[32];
    Block<T> block{params, buckets, warp_sums};
    block.place_slots();
    if constexpr (T::kMode == kJudge) {
        block.list_judged();
    } else {
        block.rank();
    }
}

}  // namespace adaattn::far_work
