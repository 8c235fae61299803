// sm90_attn_fwd_f16.cuh -- exact attention forward, bf16 or f16, on Hopper's matrix unit. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block takes work records (work_item.cuh) one after the other: a tile of query rows and the key tiles they see.
//              1. s = q k^T for a tile of keys.                     2. s_j = -inf where the row does not see key j.
//              3. r <- max s, if it grew by more than the slack.    4. p_j = 2^(c s_j - c r), c = scale log2(e).
//              5. l <- l 2^(c r_old - c r) + sum_j p_j.             6. o <- o 2^(c r_old - c r) + p v.
//              7. After the last tile: out = o / l, lse = scale r + ln l; rows that saw no key: 0 and -inf.
//              8. Rows whose result is not finite are recomputed key by key (repair_row.cuh).
//              Step 1 of a tile and step 6 of the tile before it are in flight together while step 4 runs, also across records.
//              Source: FlashAttention-3, arXiv 2407.08608, algorithm 2; the slack: softmax/online.cuh.
// Numerics     q, k, v, p: bf16 or f16; s, o, r, l: f32. (r1) wgmma's f32 accumulation of s; (r2) ex2.approx, 2 ulp; (r3) p to
//              16 bits; (r4) wgmma's accumulation of o; (r5) out to 16 bits. l sums p before r3.
// Tiles        Block: 64 kConsumers queries x kTileN keys. Warpgroup 0 gives its registers away; one of its threads starts all
//              copies. Warpgroups 1 .. kConsumers: 64 query rows each, m64nNk16, s = ss (both shared), o = rs (p in registers).
// Shared mem   | name    | type   | shape                                  | swizzle | live                                    |
//              | queries | 16 bit | kQueryStages x dim_qk / 64 x tile_m x 64 | 128 B   | item opened .. its last scores          |
//              | keys    | 16 bit | kStages x dim_qk / 64 x tile_n x 64      | 128 B   | copied .. scores                        |
//              | values  | 16 bit | kStages x dim_v / 64 x tile_n x 64       | 128 B   | copied .. output                        |
//              | records | i32    | kRecordSlots                           | none    | one item ahead .. output written        |
//              Nothing is aliased.
// Registers    Producer 24 or 32, consumers 240, 160 or 112 (2, 3, 4 of them); no spill in any specialisation of tuning/sm90.py.
// Budget: registers<=168 spill_bytes=0 smem_bytes<=232448
// Barriers     | name                | kind     | arrivals                  | producer -> consumer           | phase             |
//              | query, key, value   | mbarrier | full 1 + bytes            | copy engine -> consumer warps  | count / stages    |
//              |   full / empty      |          | empty 4 kConsumers warps  | consumer warps -> copying lane | the same, flipped |
//              | record full         | mbarrier | 1 + bytes                 | copy engine -> everyone        | item / slots      |
//              | record empty        | mbarrier | 128 kConsumers            | consumer threads -> copying one | the same, flipped |
//              | turn of consumer i  | named    | 128 arrive, 128 wait      | consumer i - 1 -> i            | one a tile        |
// Limits       dim_qk, dim_v multiples of 8 up to 256, zero-padded to 64, 128, 192 or 256 by the copy engine; 16-byte aligned
//              rows; scale > 0; lengths below 2^29; every record has at least one key tile. All checked by the host.
// Ladder       docs/kernels/sm90_attn_fwd_f16.md.
#pragma once

#include "adaattn/attn/params.cuh"
#include "adaattn/attn/sm90_epilogue.cuh"
#include "adaattn/attn/work_item.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/warpgroup.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/ptx/wgmma_mma.cuh"
#include "adaattn/softmax/online.cuh"

namespace adaattn::sm90_attn_fwd_f16 {

using Params = AttentionParams;

enum NamedBarrier : u32 { kTurnOfFirstConsumer = 1 };  // 0 is __syncthreads; one id per consumer warpgroup from here on

template <class ElementT, int kDimQkT, int kDimVT, int kConsumersT, int kTileNT, int kStagesT, int kQueryStagesT,
          int kPingPongT, int kBiasT, int kMaxSourcesT>
struct Traits {
    using Element = ElementT;
    static constexpr int kDimQk = kDimQkT;  // 64, 128, 192 or 256: the arrays' dims padded
    static constexpr int kDimV = kDimVT;
    static constexpr int kConsumers = kConsumersT;  // warpgroups of 64 query rows
    static constexpr int kTileM = 64 * kConsumers;
    static constexpr int kTileN = kTileNT;
    static constexpr int kStages = kStagesT;             // of keys, and of values
    static constexpr int kQueryStages = kQueryStagesT;   // 2: the next item's queries arrive during this item
    static constexpr bool kPingPong = kPingPongT != 0;   // consumers take turns at the matrix unit
    static constexpr bool kBias = kBiasT != 0;
    static constexpr int kMaxSources = kMaxSourcesT;

    static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

    static constexpr int kPanelsQk = kDimQk / ptx::kPanelColumns;
    static constexpr int kPanelsV = kDimV / ptx::kPanelColumns;
    static constexpr int kQueryBytes = kTileM * kDimQk * 2;
    static constexpr int kKeyBytes = kTileN * kDimQk * 2;
    static constexpr int kValueBytes = kTileN * kDimV * 2;
    // Records alive at once: the item whose queries are loaded, those still in the other query stages, one whose queries are
    // all read but whose output is not yet written, and the one fetched ahead: kQueryStages + 3, as a power of two.
    static constexpr int kRecordSlots = kQueryStages == 1 ? 4 : 8;
    static constexpr int kRecordBytes = static_cast<int>(sizeof(WorkRecord<kMaxSources>));
    static constexpr int kKeyOffset = kQueryStages * kQueryBytes;
    static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
    static constexpr int kRecordOffset = kValueOffset + kStages * kValueBytes;
    static constexpr int kBarrierOffset = kRecordOffset + kRecordSlots * kRecordBytes;
    static constexpr int kBarriers = 2 * kQueryStages + 4 * kStages + 2 * kRecordSlots;
    static constexpr int kSmemBytes = round_up(kBarrierOffset + 8 * kBarriers, 128);

    static_assert(kTileN % 16 == 0 && kTileN >= 64 && kTileN <= 256, "one wgmma covers a tile's keys");
    static_assert(kConsumers >= 2 && kConsumers <= 4, "register hand-over is tabled for 2, 3 and 4 consumers");
    static_assert(kSmemBytes <= 232448, "shared memory of one block on sm_90");
};

// Addresses of the barriers. `full`: one arrival, by the producer, plus the copy engine's bytes; consumers wait. `empty`: one lane
// of each consumer warp arrives once the warp's last read is done; the producer waits, else it would overwrite what is being read.
template <class T>
struct Barriers {
    u32 base;
    __device__ __forceinline__ u32 query_full(int stage) const { return base + 8 * stage; }
    __device__ __forceinline__ u32 query_empty(int stage) const { return query_full(T::kQueryStages + stage); }
    __device__ __forceinline__ u32 key_full(int stage) const { return query_full(2 * T::kQueryStages + stage); }
    __device__ __forceinline__ u32 key_empty(int stage) const { return key_full(T::kStages + stage); }
    __device__ __forceinline__ u32 value_full(int stage) const { return key_full(2 * T::kStages + stage); }
    __device__ __forceinline__ u32 value_empty(int stage) const { return key_full(3 * T::kStages + stage); }
    __device__ __forceinline__ u32 record_full(int slot) const { return key_full(4 * T::kStages + slot); }
    // Every consumer thread arrives: each reads the record for itself, so no lane can speak for its warp.
    __device__ __forceinline__ u32 record_empty(int slot) const { return record_full(T::kRecordSlots + slot); }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < T::kQueryStages; ++stage) {
            ptx::mbarrier_init(query_full(stage), 1);
            ptx::mbarrier_init(query_empty(stage), 4 * T::kConsumers);
        }
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::mbarrier_init(key_full(stage), 1);
            ptx::mbarrier_init(key_empty(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(value_full(stage), 1);
            ptx::mbarrier_init(value_empty(stage), 4 * T::kConsumers);
        }
        for (int slot = 0; slot < T::kRecordSlots; ++slot) {
            ptx::mbarrier_init(record_full(slot), 1);
            ptx::mbarrier_init(record_empty(slot), kWarpgroupThreads * T::kConsumers);
        }
        ptx::mbarrier_init_fence();
    }
};

// A ring of buffers used in order: the buffer of the count-th use, and the parity of the phase that its `full` barrier then completes.
template <int kSize>
struct Ring {
    static_assert((kSize & (kSize - 1)) == 0, "a power of two, so that one counter serves index and parity");
    static __device__ __forceinline__ int index(int count) { return count & (kSize - 1); }
    static __device__ __forceinline__ u32 parity(int count) { return static_cast<u32>(count / kSize) & 1u; }
};

// ---- producer: one thread starts every copy -----------------------------------------------------------------------------------

template <class T>
struct Producer {
    const Params& params;
    const Barriers<T> barriers;
    const u32 smem;
    const WorkRecord<T::kMaxSources>* records;  // in shared memory

    __device__ __forceinline__ void fetch_record(int round) const {
        const auto* column = static_cast<const WorkRecord<T::kMaxSources>*>(params.records) + blockIdx.x;
        const int slot = Ring<T::kRecordSlots>::index(round);
        ptx::mbarrier_wait(barriers.record_empty(slot), Ring<T::kRecordSlots>::parity(round) ^ 1u);
        ptx::mbarrier_arrive_expect(barriers.record_full(slot), T::kRecordBytes);
        ptx::bulk_load(smem + T::kRecordOffset + slot * T::kRecordBytes, column + static_cast<i64>(round) * gridDim.x,
                       T::kRecordBytes, barriers.record_full(slot));
    }

    __device__ __forceinline__ void load_queries(const WorkItem& item, int round) const {
        const int stage = Ring<T::kQueryStages>::index(round);
        ptx::mbarrier_wait(barriers.query_empty(stage), Ring<T::kQueryStages>::parity(round) ^ 1u);
        ptx::mbarrier_arrive_expect(barriers.query_full(stage), T::kQueryBytes);
        for (int panel = 0; panel < T::kPanelsQk; ++panel) {
            ptx::tma_load(smem + stage * T::kQueryBytes + panel * T::kTileM * ptx::kPanelRowBytes, &params.query_map,
                          barriers.query_full(stage), ptx::kEvictFirst, panel * ptx::kPanelColumns, item.row_first, item.head,
                          item.batch);
        }
    }

    template <int kPanels>
    __device__ __forceinline__ void load_tile(const ptx::TensorMap* maps, const TileCursor<T::kTileN, T::kMaxSources>& cursor,
                                              u32 destination, u32 full, u32 empty, u32 empty_parity) const {
        const Source& source = cursor.current();
        constexpr int kPanelBytes = T::kTileN * ptx::kPanelRowBytes;
        ptx::mbarrier_wait(empty, empty_parity);
        ptx::mbarrier_arrive_expect(full, kPanels * kPanelBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
            ptx::tma_load(destination + panel * kPanelBytes, &maps[source.map], full, ptx::kEvictLast,
                          panel * ptx::kPanelColumns, cursor.first_key(), source.head, source.batch);
        }
    }
    __device__ __forceinline__ void load_keys(const TileCursor<T::kTileN, T::kMaxSources>& cursor, int count) const {
        const int stage = Ring<T::kStages>::index(count);
        load_tile<T::kPanelsQk>(params.key_map, cursor, smem + T::kKeyOffset + stage * T::kKeyBytes, barriers.key_full(stage),
                                barriers.key_empty(stage), Ring<T::kStages>::parity(count) ^ 1u);
    }
    __device__ __forceinline__ void load_values(const TileCursor<T::kTileN, T::kMaxSources>& cursor, int count) const {
        const int stage = Ring<T::kStages>::index(count);
        load_tile<T::kPanelsV>(params.value_map, cursor, smem + T::kValueOffset + stage * T::kValueBytes,
                               barriers.value_full(stage), barriers.value_empty(stage), Ring<T::kStages>::parity(count) ^ 1u);
    }

    __device__ __forceinline__ void run() const {
        int tiles = 0;  // key tiles started, over all items; one more than value tiles
        fetch_record(0);
        for (int round = 0; round < params.rounds; ++round) {
            const int slot = Ring<T::kRecordSlots>::index(round);
            ptx::mbarrier_wait(barriers.record_full(slot), Ring<T::kRecordSlots>::parity(round));
            const WorkRecord<T::kMaxSources>& record = records[slot];
            if (record.item.rows == 0) return;
            load_queries(record.item, round);
            if (round + 1 < params.rounds) fetch_record(round + 1);

            // Keys run one tile ahead of values, as the consumers use them.
            TileCursor<T::kTileN, T::kMaxSources> keys;
            keys.open(record);
            load_keys(keys, tiles++);
            while (!keys.at_last()) {
                const TileCursor<T::kTileN, T::kMaxSources> values = keys;
                keys.next();
                load_keys(keys, tiles);
                load_values(values, tiles++ - 1);
            }
            load_values(keys, tiles - 1);
        }
    }
};

// ---- consumer: 64 query rows a warpgroup --------------------------------------------------------------------------------------

template <class T>
struct Consumer {
    const Params& params;
    const Barriers<T> barriers;
    const u32 smem;
    const WorkRecord<T::kMaxSources>* records;  // in shared memory
    const int warpgroup;                        // 0 .. kConsumers - 1
    int items;  // opened so far
    int tiles;  // score tiles finished so far, over all items; one more than output tiles
    TileCursor<T::kTileN, T::kMaxSources> cursor;
    softmax::Online state;

    // Read anew where needed: the main loop has no register to keep them in.
    __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % kWarpThreads; }
    // First of this warp's 16 rows within the tile.
    __device__ __forceinline__ int row() const {
        return 16 * (static_cast<int>(threadIdx.x) / kWarpThreads - kWarpgroupThreads / kWarpThreads);
    }
    __device__ __forceinline__ void release(u32 empty_barrier) const {
        if (lane() == 0) ptx::mbarrier_arrive(empty_barrier);
    }
    // Turns keep one consumer's products together, so that its softmax falls under another's products.
    __device__ __forceinline__ void wait_turn() const {
        if constexpr (T::kPingPong) ptx::named_barrier_sync(kTurnOfFirstConsumer + warpgroup, 2 * kWarpgroupThreads);
    }
    __device__ __forceinline__ void pass_turn() const {
        if constexpr (T::kPingPong) {
            const int next = warpgroup + 1 == T::kConsumers ? 0 : warpgroup + 1;
            ptx::named_barrier_arrive(kTurnOfFirstConsumer + next, 2 * kWarpgroupThreads);
        }
    }

    __device__ __forceinline__ const WorkRecord<T::kMaxSources>& record(int item) const {
        return records[Ring<T::kRecordSlots>::index(item)];
    }

    // Moves to the next item, if there is one, and waits for its queries.
    __device__ __forceinline__ bool open_item() {
        if (items == params.rounds) return false;
        ptx::mbarrier_wait(barriers.record_full(Ring<T::kRecordSlots>::index(items)), Ring<T::kRecordSlots>::parity(items));
        if (record(items).item.rows == 0) return false;
        ptx::mbarrier_wait(barriers.query_full(Ring<T::kQueryStages>::index(items)), Ring<T::kQueryStages>::parity(items));
        cursor.open(record(items));
        state.reset();
        ++items;
        return true;
    }

    // scores = Q K^T, started.
    __device__ __forceinline__ void start_scores(float (&scores)[T::kTileN / 2]) const {
        const int query_stage = Ring<T::kQueryStages>::index(items - 1);
        const int stage = Ring<T::kStages>::index(tiles);
        const u64 queries =
            ptx::matrix_descriptor(smem + query_stage * T::kQueryBytes + warpgroup * 64 * ptx::kPanelRowBytes, 0);
        const u64 keys = ptx::matrix_descriptor(smem + T::kKeyOffset + stage * T::kKeyBytes, 0);
        ptx::mbarrier_wait(barriers.key_full(stage), Ring<T::kStages>::parity(tiles));
        wait_turn();
        ptx::pin(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kDimQk / 16; ++k) {
            ptx::Wgmma<typename T::Element, T::kTileN>::ss(scores, ptx::advance(queries, ptx::k_slice_bytes(k, T::kTileM)),
                                                           ptx::advance(keys, ptx::k_slice_bytes(k, T::kTileN)), k != 0);
        }
        ptx::wgmma_commit();
    }

    // Call when the scores are there: nothing reads this key tile, or after an item's last one its queries, any more.
    __device__ __forceinline__ void finish_scores(float (&scores)[T::kTileN / 2]) {
        ptx::pin(scores);
        release(barriers.key_empty(Ring<T::kStages>::index(tiles)));
        if (cursor.at_last()) release(barriers.query_empty(Ring<T::kQueryStages>::index(items - 1)));
        ++tiles;
    }

    // acc += P V, started.
    __device__ __forceinline__ void start_output(float (&acc)[T::kDimV / 2], u32 (&weights)[T::kTileN / 4]) const {
        const int stage = Ring<T::kStages>::index(tiles - 1);
        const u64 values =
            ptx::matrix_descriptor(smem + T::kValueOffset + stage * T::kValueBytes, T::kTileN * ptx::kPanelRowBytes);
        ptx::mbarrier_wait(barriers.value_full(stage), Ring<T::kStages>::parity(tiles - 1));
        ptx::pin(acc);
        ptx::pin(weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kTileN / 16; ++k) {
            ptx::Wgmma<typename T::Element, T::kDimV>::rs(acc, &weights[4 * k],
                                                          ptx::advance(values, 16 * k * ptx::kPanelRowBytes), 1);
        }
        ptx::wgmma_commit();
    }

    // Call when the product of value tile number `tile` is there.
    __device__ __forceinline__ void finish_output(float (&acc)[T::kDimV / 2], u32 (&weights)[T::kTileN / 4], int tile) const {
        ptx::pin(acc);
        ptx::pin(weights);
        release(barriers.value_empty(Ring<T::kStages>::index(tile)));
    }

    __device__ __forceinline__ void add_bias(float (&scores)[T::kTileN / 2]) const {
        const int column = 2 * (lane() % 4);
        const int left = cursor.keys_left();
        const float* bias = params.bias + cursor.current().bias_first + cursor.tile * T::kTileN + column;
#pragma unroll
        for (int i = 0; i < T::kTileN / 2; i += 4) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float addend = column + 2 * i + e < left ? bias[2 * i + e] * params.inverse_scale : 0.0f;
                scores[i + e] += addend;
                scores[i + 2 + e] += addend;
            }
        }
    }

    __device__ __forceinline__ bool mask_needed() const {
        return mask::needed(cursor.item(), cursor.current(), cursor.position(), cursor.keys_left(), T::kTileN, 64 * warpgroup,
                            64 * warpgroup + 63);
    }

    // Scores to probabilities. Returns whether the accumulators must be multiplied by `factor`.
    __device__ __forceinline__ bool soften(float (&scores)[T::kTileN / 2], bool fresh, float (&factor)[2]) {
        if constexpr (T::kBias) add_bias(scores);
        if (mask_needed()) {
            mask::apply(scores, cursor.item(), cursor.current(), cursor.position(), cursor.keys_left(), row() + lane() / 4,
                        lane());
        }
        return state.exponentiate(scores, params.scale_log2, params.slack, fresh, factor);
    }

    // One loop over the tiles of all items: the scores of a tile and the output of the tile before it are in flight together,
    // also where the two belong to different items, so that only the block's very first and last products stand alone.
    __device__ __forceinline__ void run() {
        using Element = typename T::Element;
        float acc[T::kDimV / 2];
        float scores[T::kTileN / 2];
        u32 weights[T::kTileN / 4];
        float factor[2];  // what each row of acc is to be multiplied by: to follow the reference, or to be normalised
        softmax::clear(acc);
        if (!open_item()) return;
        start_scores(scores);
        pass_turn();
        ptx::wgmma_wait<0>();
        finish_scores(scores);
        soften(scores, true, factor);
        softmax::round_pairs<Element>(scores, weights);

#pragma unroll 1
        while (true) {
            const bool boundary = cursor.at_last();
            if (boundary) {
                write_lse(params, *cursor.record, state, row(), lane(), factor);
                if (!open_item()) break;
            } else {
                cursor.next();
            }
            start_scores(scores);
            start_output(acc, weights);
            pass_turn();
            ptx::wgmma_wait<1>();
            finish_scores(scores);
            const bool moved = soften(scores, boundary, factor);
            // Each arm waits for itself: a wait above the branch would be scheduled before the exponentials that should hide it.
            // The warps of a warpgroup agree on `boundary`, as a wait demands, but not on `moved`.
            if (boundary) {
                ptx::wgmma_wait_all_in_branch();
                finish_output(acc, weights, tiles - 2);
                write_rows<Element, T::kDimV, T::kBias>(params, record(items - 2), acc, factor, row(), lane());
                ptx::mbarrier_arrive(barriers.record_empty(Ring<T::kRecordSlots>::index(items - 2)));
                softmax::clear(acc);
            } else {
                ptx::wgmma_wait<0>();
                finish_output(acc, weights, tiles - 2);
                if (moved) softmax::rescale_rows(acc, factor);
            }
            softmax::round_pairs<Element>(scores, weights);
        }
        start_output(acc, weights);
        ptx::wgmma_wait<0>();
        finish_output(acc, weights, tiles - 1);
        write_rows<Element, T::kDimV, T::kBias>(params, record(items - 1), acc, factor, row(), lane());
    }
};

template <class T>
__device__ __forceinline__ void run(const Params& params) {
    extern __shared__ __align__(1024) char smem_bytes[];
    const u32 smem = ptx::shared_address(smem_bytes);
    const Barriers<T> barriers{smem + T::kBarrierOffset};
    const auto* records = reinterpret_cast<const WorkRecord<T::kMaxSources>*>(smem_bytes + T::kRecordOffset);
    const int warp = ptx::warp_uniform(static_cast<int>(threadIdx.x) / kWarpThreads);

    if (threadIdx.x == 0) {
        if (smem % ptx::kSwizzleAtomBytes != 0) __trap();  // the swizzle is a function of the address
        ptx::prefetch_tensor_map(&params.query_map);
        ptx::prefetch_tensor_map(&params.key_map[0]);
        ptx::prefetch_tensor_map(&params.value_map[0]);
        barriers.init();
    }
    __syncthreads();

    if (warp < 4) {
        ptx::registers_give<T::kProducerRegisters>();
        if (threadIdx.x == 0) {
            Producer<T> producer{params, barriers, smem, records};
            producer.run();
        }
    } else {
        ptx::registers_take<T::kConsumerRegisters>();
        Consumer<T> consumer{params, barriers, smem, records, warp / 4 - 1};
        // The first consumer's first turn is given here; from then on each passes it to the next.
        if (consumer.warpgroup == T::kConsumers - 1) consumer.pass_turn();
        consumer.run();
    }
}

}  // namespace adaattn::sm90_attn_fwd_f16
