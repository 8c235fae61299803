// sm90_bwd_producer.cuh -- what the warps that copy do in Hopper's backward kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/sm90_bwd_params.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/ptx/sm90.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/wgmma.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

// Addresses of the barriers; the kernel's header says who arrives and who waits.
template <class T>
struct Barriers {
    u32 base;
    ADAATTN_DEVICE u32 keys_full() const { return base; }
    ADAATTN_DEVICE u32 query_full(int stage) const { return base + 8 * (1 + stage); }
    ADAATTN_DEVICE u32 query_empty(int stage) const { return query_full(T::kStages + stage); }
    ADAATTN_DEVICE u32 grad_full(int stage) const { return query_full(2 * T::kStages + stage); }
    ADAATTN_DEVICE u32 grad_empty(int stage) const { return query_full(3 * T::kStages + stage); }
    ADAATTN_DEVICE u32 rows_full(int stage) const { return query_full(4 * T::kStages + stage); }
    ADAATTN_DEVICE u32 rows_empty(int stage) const { return query_full(5 * T::kStages + stage); }
    ADAATTN_DEVICE u32 ds_full(int stage) const { return query_full(6 * T::kStages + stage); }
    ADAATTN_DEVICE u32 ds_empty(int stage) const { return query_full(7 * T::kStages + stage); }

    ADAATTN_DEVICE void init() const {
        ptx::mbarrier_init(keys_full(), 1);
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::mbarrier_init(query_full(stage), 1);
            ptx::mbarrier_init(query_empty(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(grad_full(stage), 1);
            ptx::mbarrier_init(grad_empty(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(rows_full(stage), kWarpThreads);
            ptx::mbarrier_init(rows_empty(stage), kWarpgroupThreads * T::kConsumers);
            ptx::mbarrier_init(ds_full(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(ds_empty(stage), 4 * T::kConsumers);
        }
        ptx::mbarrier_init_fence();
    }
};

// Named barriers of a consumer, 0 or 1, and the warp that adds its sums to memory.
constexpr u32 kSumThreads = kWarpgroupThreads + kWarpThreads;
ADAATTN_DEVICE u32 sums_full(u32 half, u32 stage) { return 1 + 4 * stage + 2 * half; }
ADAATTN_DEVICE u32 sums_empty(u32 half, u32 stage) { return 2 + 4 * stage + 2 * half; }

// A block's keys (the rows of `item`), and the tiles of queries [begin, end) that see any of them,
// walked over once for each of the query heads from `first_head` on.
struct KeyWork {
    work::WorkItem item;
    work::Source source;
    int begin, end;
    int first_head;
    int count;
    int tiles_after;             // of keys, in this sequence
    int whole_begin, whole_end;  // the tiles of queries that see every key
    int reserved;

    ADAATTN_DEVICE bool sees_whole(int tile) const {
        return (tile >= whole_begin) & (tile < whole_end);
    }
};

// Tiles run fastest, so that the blocks of a head run together and share its queries in L2. The
// first tile comes first, which under a causal mask is the longest; with kInOrder the last one,
// because nobody may wait for a block that is not there yet.
template <class T>
ADAATTN_DEVICE KeyWork key_work(const Params& params, int block) {
    constexpr int kTileN = T::kTileN, kTileM = T::kTileM;
    const work::UnitList& list = params.work;
    const int units = list.unit_count > 0 ? list.unit_count : list.batch;
    const int place = block % list.tiles;
    const int from_last = T::kInOrder ? place : list.tiles - 1 - place;
    const int head = block / list.tiles % list.heads_per_unit;
    const int unit = block / list.tiles / list.heads_per_unit;
    const work::UnitWork own =
        work::work_of_block<kTileN>(list, (from_last * units + unit) * list.heads_per_unit + head);
    KeyWork found;
    found.item = own.item;
    found.source = own.source;
    const mask::Interval of_first = mask::visible(own.item, 0);
    const mask::Interval of_last = mask::visible(own.item, own.item.rows - 1);
    found.begin = of_first.start / kTileM;
    found.end = of_last.stop > of_first.start ? ceil_div(of_last.stop, kTileM) : found.begin;
    found.whole_begin = ceil_div(of_last.start, kTileM);
    found.whole_end = own.item.rows < kTileN ? 0 : of_first.stop / kTileM;
    found.first_head = own.item.head * params.group;
    found.count = (found.end - found.begin) * params.group;
    const int length = list.unit_count > 0 ? list.units[unit].len_q : list.len_q;
    found.tiles_after = ceil_div(length, kTileN) - list.tiles + from_last;
    return found;
}

// One thread: keys and values once, then queries and gradients tile by tile.
template <class T>
ADAATTN_DEVICE void produce(const Params& params, const Barriers<T>& barriers, u32 smem,
                            const KeyWork& work) {
    if (work.count == 0) return;
    const int batch = work.item.batch;
    const auto load = [&](const ptx::TensorMap& map, u32 to, u32 full, int panels, int rows,
                          int first_row, int head, u64 policy) {
        for (int panel = 0; panel < panels; ++panel) {
            ptx::tma_load(to + panel * rows * ptx::kPanelRowBytes, &map, full, policy,
                          panel * ptx::kPanelColumns, first_row, head, batch);
        }
    };
    ptx::mbarrier_arrive_expect(barriers.keys_full(), T::kKeyBytes + T::kValueBytes);
    load(params.key_map, smem, barriers.keys_full(), T::kPanelsQk, T::kTileN, work.item.row_first,
         work.item.head, ptx::kEvictFirst);
    load(params.value_map, smem + T::kValueAt, barriers.keys_full(), T::kPanelsV, T::kTileN,
         work.item.row_first, work.item.head, ptx::kEvictFirst);
    int tile = work.begin, head = work.first_head;
    for (int i = 0; i < work.count; ++i) {
        const int stage = i & 1;
        const u32 parity = (static_cast<u32>(i / 2) & 1u) ^ 1u;
        const int first_row = work.source.first_key + tile * T::kTileM;
        ptx::mbarrier_wait(barriers.query_empty(stage), parity);
        ptx::mbarrier_arrive_expect(barriers.query_full(stage), T::kQueryBytes);
        load(params.query_map, smem + T::kQueryAt + stage * T::kQueryBytes,
             barriers.query_full(stage), T::kPanelsQk, T::kTileM, first_row, head, ptx::kEvictLast);
        ptx::mbarrier_wait(barriers.grad_empty(stage), parity);
        ptx::mbarrier_arrive_expect(barriers.grad_full(stage), T::kGradBytes);
        load(params.grad_map, smem + T::kGradAt + stage * T::kGradBytes, barriers.grad_full(stage),
             T::kPanelsV, T::kTileM, first_row, head, ptx::kEvictLast);
        const bool wraps = tile + 1 == work.end;
        tile = wraps ? work.begin : tile + 1;
        head += wraps;
    }
}

// One warp: lse and delta of the queries of each tile; rows that do not exist see nothing.
template <class T>
ADAATTN_DEVICE void bring_rows(const Params& params, const Barriers<T>& barriers, u32 smem,
                               const KeyWork& work) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    int tile = work.begin, head = work.first_head;
    for (int i = 0; i < work.count; ++i) {
        const int stage = i & 1;
        const u32 parity = (static_cast<u32>(i / 2) & 1u) ^ 1u;
        const i64 base =
            (static_cast<i64>(work.item.batch) * params.heads_q + head) * params.len_q +
            work.source.first_key;
        float lse[T::kSlabs][2], delta[T::kSlabs][2];
#pragma unroll
        for (int r = 0; r < 2 * T::kSlabs; ++r) {
            const int row = tile * T::kTileM + r / 2 * 64 + 2 * lane + r % 2;
            const bool exists = row < work.source.keys;
            lse[r / 2][r % 2] = exists ? params.lse[base + row] : ptx::infinity();
            delta[r / 2][r % 2] = exists ? params.delta[base + row] : 0.0f;
        }
        ptx::mbarrier_wait(barriers.rows_empty(stage), parity);
        const u32 to = smem + T::kRowAt + stage * T::kRowBytes + lane * 8;
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab) {
            ptx::store_shared_f32x2(to + 256 * slab, lse[slab][0], lse[slab][1]);
            ptx::store_shared_f32x2(to + 256 * slab + T::kTileM * 4, delta[slab][0],
                                    delta[slab][1]);
        }
        ptx::mbarrier_arrive(barriers.rows_full(stage));
        const bool wraps = tile + 1 == work.end;
        tile = wraps ? work.begin : tile + 1;
        head += wraps;
    }
}

}  // namespace adaattn::sm90_attn_bwd_f16
