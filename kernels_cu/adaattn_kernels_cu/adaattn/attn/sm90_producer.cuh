// sm90_producer.cuh -- the one thread of an sm90 kernel that starts every copy.
// SPDX-License-Identifier: Apache-2.0
//
// T is the kernel's Traits. The thread runs one work item ahead with records and, as far as there
// are stages, with queries, keys and values; the consumers' empty barriers hold it back.
#pragma once

#include "adaattn/attn/sm90_params.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/tile/ring.cuh"
#include "adaattn/tile/sm90_barriers.cuh"
#include "adaattn/work/tile_cursor.cuh"

namespace adaattn {

// Which sources an item has: all of it that is needed to copy them.
struct SourceRun {
    i32 first;
    i32 count;
    i64 place;  // of the item
};

template <int kRole>
ADAATTN_DEVICE SourceRun sources_of(const AttentionParams& params, int round) {
    i64 place = static_cast<i64>(round) * gridDim.x + blockIdx.x;
    if constexpr (kRole != kDense) {
        if (params.queue != nullptr)
            place = smaller(atomicAdd(&params.queue->next, 1), params.queue->items);
    }
    const work::WorkItem& item = params.items[place];
    const int2 pair = *reinterpret_cast<const int2*>(&item.first_source);
    return {pair.x, pair.y, place};
}

template <class T>
struct Producer {
    using Record = work::WorkRecord<T::kMaxSources>;
    using Cursor = work::TileCursor<T::kTileN, T::kMaxSources>;
    using RecordRing = tile::Ring<T::kRecordSlots>;
    using QueryRing = tile::Ring<T::kQueryStages>;
    using TileRing = tile::Ring<T::kStages>;

    const typename T::Params& params;
    const tile::Barriers<T> barriers;
    const u32 smem;
    const Record* records;  // in shared memory
    SourceRun next;         // of the record that is fetched next: read one item ahead

    // Item and sources come from two tables and arrive together.
    ADAATTN_DEVICE void fetch_record(int round) {
        constexpr u32 kItemBytes = sizeof(work::WorkItem);
        const int slot = RecordRing::index(round);
        const u32 full = barriers.record_full(slot);
        const u32 destination = smem + T::kRecordOffset + slot * T::kRecordBytes;
        const u32 count = T::kMaxSources > 1 ? larger(next.count, 1) : 1;
        const u32 source_bytes = count * static_cast<u32>(sizeof(work::Source));
        ptx::mbarrier_wait(barriers.record_empty(slot), RecordRing::parity(round) ^ 1u);
        ptx::mbarrier_arrive_expect(full, kItemBytes + source_bytes);
        ptx::bulk_load(destination, params.items + next.place, kItemBytes, full);
        ptx::bulk_load(destination + kItemBytes, params.sources + next.first, source_bytes, full);
        if (round + 1 < params.rounds) next = sources_of<T::kRole>(params, round + 1);
    }

    ADAATTN_DEVICE void load_queries(const work::WorkItem& item, int round) const {
        const int stage = QueryRing::index(round);
        const u32 full = barriers.query_full(stage);
        ptx::mbarrier_wait(barriers.query_empty(stage), QueryRing::parity(round) ^ 1u);
        ptx::mbarrier_arrive_expect(full, T::kQueryBytes);
        for (int panel = 0; panel < T::kPanelsQk; ++panel) {
            ptx::tma_load(smem + stage * T::kQueryBytes + panel * T::kTileM * ptx::kPanelRowBytes,
                          &params.query_map, full, ptx::kEvictFirst, panel * T::kColumnsQk,
                          item.row_first, item.head, item.batch);
        }
    }

    // Keys or values of a tile, and what comes with them: bytes of `extra` to `extra_place`. Codes
    // of a quantiser lie at places of their own; those of values, transposed, in panels of 128 keys.
    template <int kPanels, int kPanelBytes, int kColumns, bool kCodes, bool kTransposed>
    ADAATTN_DEVICE void load_tile(const ptx::TensorMap* maps, const Cursor& cursor, u32 destination,
                                  u32 full, u32 empty, u32 empty_parity, u32 extra_place = 0,
                                  const void* extra = nullptr, u32 extra_bytes = 0) const {
        const work::Source& source = cursor.current();
        ptx::mbarrier_wait(empty, empty_parity);
        ptx::mbarrier_arrive_expect(full, kPanels * kPanelBytes + extra_bytes);
        if (extra_bytes != 0) ptx::bulk_load(extra_place, extra, extra_bytes, full);
        int row = cursor.first_key() + (kCodes ? cursor.item().code_shift : 0);
        // A tile that no row sees lies far outside. Where keys are the innermost dimension it is
        // moved to the end, on a multiple of 16 bytes: elsewhere the copy would be illegal.
        if constexpr (kTransposed) row = smaller(row, params.rows_kv);
        for (int panel = 0; panel < kPanels; ++panel) {
            const int column = panel * kColumns;
            ptx::tma_load(destination + panel * kPanelBytes, &maps[source.tensor], full,
                          ptx::kEvictLast, kTransposed ? row + column : column,
                          kTransposed ? 0 : row, source.head, source.batch);
        }
    }
    ADAATTN_DEVICE void load_keys(const Cursor& cursor, int count) const {
        const int stage = TileRing::index(count);
        const void* extra = nullptr;
        u32 extra_bytes = 0;
        if constexpr (T::kScaleBytes > 0) {
            extra = scales_of(params, cursor);
            extra_bytes = T::kScaleBytes;
        } else if constexpr (T::kBiases) {
            const i32 first_bias = cursor.current().first_bias;
            if (first_bias != work::kNoBias) {
                extra = params.bias + first_bias + cursor.tile * T::kTileN;
                extra_bytes = 4 * T::kTileN;
            }
        }
        load_tile<T::kPanelsQk, T::kTileN * ptx::kPanelRowBytes, T::kColumnsQk, T::kCodesQk, false>(
            params.key_map, cursor, smem + T::kKeyOffset + stage * T::kKeyBytes,
            barriers.key_full(stage), barriers.key_empty(stage), TileRing::parity(count) ^ 1u,
            smem + T::kBiasOffset + stage * (T::kBiasBytes / T::kStages), extra, extra_bytes);
    }
    ADAATTN_DEVICE void load_values(const Cursor& cursor, int count) const {
        const int stage = TileRing::index(count);
        load_tile<T::kPanelsV, T::kValueBytes / T::kPanelsV, T::kColumnsV, T::kCodesPv,
                  T::kCodesPv>(
            params.value_map, cursor, smem + T::kValueOffset + stage * T::kValueBytes,
            barriers.value_full(stage), barriers.value_empty(stage), TileRing::parity(count) ^ 1u);
    }

    ADAATTN_DEVICE void run() {
        int tiles = 0;  // key tiles started, over all items; one more than value tiles
        fetch_record(0);
        for (int round = 0; round < params.rounds; ++round) {
            const int slot = RecordRing::index(round);
            ptx::mbarrier_wait(barriers.record_full(slot), RecordRing::parity(round));
            const Record& record = records[slot];
            if (record.item.rows == 0) return;
            load_queries(record.item, round);
            if (round + 1 < params.rounds) fetch_record(round + 1);

            // Keys run one tile ahead of values, as the consumers use them.
            Cursor keys;
            keys.open(record, params.sources);
            load_keys(keys, tiles++);
            while (!keys.at_last()) {
                const Cursor values = keys;
                keys.next(params.sources);
                load_keys(keys, tiles);
                load_values(values, tiles++ - 1);
            }
            load_values(keys, tiles - 1);
        }
    }
};

}  // namespace adaattn
