// sm90_attn_fwd_f16.cuh -- exact attention forward, bf16 or f16, on Hopper's matrix unit. SPDX-License-Identifier: Apache-2.0
//
// Budget: registers<=168 spill_bytes=0 smem_bytes<=232448
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

template <class ElementT, int kDimQkT, int kDimVT, int kConsumersT, int kTileNT, int kStagesT, int kPingPongT, int kOverlapT,
          int kLazyT, int kBiasT, int kMaxSourcesT>
struct Traits {
    using Element = ElementT;
    static constexpr int kDimQk = kDimQkT;  // 64, 128, 192 or 256: the arrays' dims padded
    static constexpr int kDimV = kDimVT;
    static constexpr int kConsumers = kConsumersT;  // warpgroups of 64 query rows
    static constexpr int kTileM = 64 * kConsumers;
    static constexpr int kTileN = kTileNT;
    static constexpr int kStages = kStagesT;      // of keys, and of values
    static constexpr bool kPingPong = kPingPongT;  // consumers take turns at the matrix unit
    static constexpr bool kOverlap = kOverlapT;    // the softmax of one tile runs under the products of its neighbours
    static constexpr bool kLazy = kLazyT;          // rescale only when the maximum grew beyond the slack
    static constexpr bool kBias = kBiasT;
    static constexpr int kMaxSources = kMaxSourcesT;

    static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
    static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : kConsumers == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

    static constexpr int kPanelsQk = kDimQk / ptx::kPanelColumns;
    static constexpr int kPanelsV = kDimV / ptx::kPanelColumns;
    static constexpr int kQueryBytes = kTileM * kDimQk * 2;
    static constexpr int kKeyBytes = kTileN * kDimQk * 2;
    static constexpr int kValueBytes = kTileN * kDimV * 2;
    static constexpr int kRecordSlots = 3;
    static constexpr int kRecordBytes = static_cast<int>(sizeof(WorkRecord<kMaxSources>));
    static constexpr int kBarriers = 2 + 4 * kStages + kRecordSlots;
    static constexpr int kKeyOffset = kQueryBytes;
    static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
    static constexpr int kRecordOffset = kValueOffset + kStages * kValueBytes;
    static constexpr int kBarrierOffset = kRecordOffset + kRecordSlots * kRecordBytes;
    static constexpr int kSmemBytes = round_up(kBarrierOffset + 8 * kBarriers, 128);

    static_assert(kTileN % 16 == 0 && kTileN >= 64 && kTileN <= 256, "one wgmma covers a tile's keys");
    static_assert(kConsumers >= 2 && kConsumers <= 4, "register hand-over is tabled for 2, 3 and 4 consumers");
    static_assert(kSmemBytes <= 232448, "shared memory of one block on sm_90");
};

// Addresses of the barriers; `full` is signalled by the copy engine, `empty` by one lane of each consumer warp.
template <class T>
struct Barriers {
    u32 base;
    __device__ __forceinline__ u32 query_full() const { return base; }
    __device__ __forceinline__ u32 query_empty() const { return base + 8; }
    __device__ __forceinline__ u32 key_full(int stage) const { return base + 8 * (2 + stage); }
    __device__ __forceinline__ u32 key_empty(int stage) const { return base + 8 * (2 + T::kStages + stage); }
    __device__ __forceinline__ u32 value_full(int stage) const { return base + 8 * (2 + 2 * T::kStages + stage); }
    __device__ __forceinline__ u32 value_empty(int stage) const { return base + 8 * (2 + 3 * T::kStages + stage); }
    __device__ __forceinline__ u32 record_full(int slot) const { return base + 8 * (2 + 4 * T::kStages + slot); }

    __device__ __forceinline__ void init() const {
        ptx::mbarrier_init(query_full(), 1);
        ptx::mbarrier_init(query_empty(), 4 * T::kConsumers);
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::mbarrier_init(key_full(stage), 1);
            ptx::mbarrier_init(key_empty(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(value_full(stage), 1);
            ptx::mbarrier_init(value_empty(stage), 4 * T::kConsumers);
        }
        for (int slot = 0; slot < T::kRecordSlots; ++slot) ptx::mbarrier_init(record_full(slot), 1);
        ptx::mbarrier_init_fence();
    }
};

// Position in a ring of buffers: the index, and the parity of the phase that completes its `full` barrier this time round.
template <int kSize>
struct Ring {
    int index = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++index == kSize) {
            index = 0;
            parity ^= 1u;
        }
    }
};

// ---- producer: one thread starts every copy -----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void load_tile(u32 destination, const ptx::TensorMap* map, u32 barrier, const Source& source, int row,
                                          int panels) {
    for (int panel = 0; panel < panels; ++panel) {
        ptx::tma_load(destination + panel * T::kTileN * ptx::kPanelRowBytes, map, barrier, ptx::kEvictLast,
                      panel * ptx::kPanelColumns, row, source.head, source.batch);
    }
}

template <class T>
__device__ __forceinline__ void produce(const Params& params, char* smem, u32 smem_base, Barriers<T> barriers) {
    using Record = WorkRecord<T::kMaxSources>;
    const Record* records_s = reinterpret_cast<const Record*>(smem + T::kRecordOffset);
    const Record* records_g = static_cast<const Record*>(params.records) + blockIdx.x;
    const auto fetch_record = [&](int round, int slot) {
        ptx::mbarrier_arrive_expect(barriers.record_full(slot), T::kRecordBytes);
        ptx::bulk_load(smem_base + T::kRecordOffset + slot * T::kRecordBytes, records_g + static_cast<i64>(round) * gridDim.x,
                       T::kRecordBytes, barriers.record_full(slot));
    };

    Ring<T::kRecordSlots> slot;
    Ring<T::kStages> key_stage;
    Ring<T::kStages> value_stage;
    fetch_record(0, 0);
    for (int round = 0; round < params.rounds; ++round) {
        ptx::mbarrier_wait(barriers.record_full(slot.index), slot.parity);
        const Record& record = records_s[slot.index];
        const WorkItem& item = record.item;
        if (item.rows == 0) return;

        // Consumers have read every query of the previous item, hence finished the item before it: its slot, which is the
        // one after this, is free.
        ptx::mbarrier_wait(barriers.query_empty(), (round & 1) ^ 1u);
        slot.next();
        if (round + 1 < params.rounds) fetch_record(round + 1, slot.index);

        ptx::mbarrier_arrive_expect(barriers.query_full(), T::kQueryBytes);
        for (int panel = 0; panel < T::kPanelsQk; ++panel) {
            ptx::tma_load(smem_base + panel * T::kTileM * ptx::kPanelRowBytes, &params.query_map, barriers.query_full(),
                          ptx::kEvictFirst, panel * ptx::kPanelColumns, item.row_first, item.head, item.batch);
        }
        if (item.tiles == 0) continue;

        const auto load_key = [&](const Source& source, int row) {
            ptx::mbarrier_wait(barriers.key_empty(key_stage.index), key_stage.parity ^ 1u);
            const u32 full = barriers.key_full(key_stage.index);
            ptx::mbarrier_arrive_expect(full, T::kKeyBytes);
            load_tile<T>(smem_base + T::kKeyOffset + key_stage.index * T::kKeyBytes, &params.key_map[source.map], full, source,
                         row, T::kPanelsQk);
            key_stage.next();
        };
        const auto load_value = [&](const Source& source, int row) {
            ptx::mbarrier_wait(barriers.value_empty(value_stage.index), value_stage.parity ^ 1u);
            const u32 full = barriers.value_full(value_stage.index);
            ptx::mbarrier_arrive_expect(full, T::kValueBytes);
            load_tile<T>(smem_base + T::kValueOffset + value_stage.index * T::kValueBytes, &params.value_map[source.map], full,
                         source, row, T::kPanelsV);
            value_stage.next();
        };

        // Keys run one tile ahead of values, as the consumers use them.
        TileCursor<T::kTileN, T::kMaxSources> keys(record);
        TileCursor<T::kTileN, T::kMaxSources> values(record);
        load_key(keys.current(), keys.first_key());
        for (int tile = 1; tile < item.tiles; ++tile) {
            keys.next();
            load_key(keys.current(), keys.first_key());
            load_value(values.current(), values.first_key());
            values.next();
        }
        load_value(values.current(), values.first_key());
    }
}

// ---- consumer: 64 query rows a warpgroup --------------------------------------------------------------------------------------

template <class T>
struct Consumer {
    const Params& params;
    Barriers<T> barriers;
    u32 key_base;
    u32 value_base;
    u64 query_descriptor;
    int warpgroup;  // 0 .. kConsumers - 1
    int lane;
    int row;  // first of this warp's 16 rows within the tile
    Ring<T::kStages> key_stage;
    Ring<T::kStages> value_stage;
    softmax::Online<T::kLazy> state;

    __device__ __forceinline__ void release(u32 empty_barrier) const {
        if (lane == 0) ptx::mbarrier_arrive(empty_barrier);
    }
    __device__ __forceinline__ void wait_turn() const {
        if constexpr (T::kPingPong) ptx::named_barrier_sync(kTurnOfFirstConsumer + warpgroup, 2 * kWarpgroupThreads);
    }
    __device__ __forceinline__ void pass_turn() const {
        if constexpr (T::kPingPong) {
            const int next = warpgroup + 1 == T::kConsumers ? 0 : warpgroup + 1;
            ptx::named_barrier_arrive(kTurnOfFirstConsumer + next, 2 * kWarpgroupThreads);
        }
    }
    __device__ __forceinline__ void wait_key() const { ptx::mbarrier_wait(barriers.key_full(key_stage.index), key_stage.parity); }
    __device__ __forceinline__ void wait_value() const {
        ptx::mbarrier_wait(barriers.value_full(value_stage.index), value_stage.parity);
    }
    __device__ __forceinline__ void release_key() {
        release(barriers.key_empty(key_stage.index));
        key_stage.next();
    }
    __device__ __forceinline__ void release_value() {
        release(barriers.value_empty(value_stage.index));
        value_stage.next();
    }

    // scores = Q K^T, started.
    __device__ __forceinline__ void start_scores(float (&scores)[T::kTileN / 2]) const {
        const u64 keys = ptx::matrix_descriptor(key_base + key_stage.index * T::kKeyBytes, 0);
        ptx::pin(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kDimQk / 16; ++k) {
            ptx::Wgmma<typename T::Element, T::kTileN>::ss(scores,
                                                           ptx::advance(query_descriptor, ptx::k_slice_bytes(k, T::kTileM)),
                                                           ptx::advance(keys, ptx::k_slice_bytes(k, T::kTileN)), k != 0);
        }
        ptx::wgmma_commit();
    }

    // acc += P V, started.
    __device__ __forceinline__ void start_output(float (&acc)[T::kDimV / 2], u32 (&weights)[T::kTileN / 4]) const {
        const u64 values = ptx::matrix_descriptor(value_base + value_stage.index * T::kValueBytes,
                                                  T::kTileN * ptx::kPanelRowBytes);
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

    // Adds biases, masks where this warpgroup's rows need it, and turns scores into probabilities.
    __device__ __forceinline__ bool soften(float (&scores)[T::kTileN / 2], const WorkItem& item,
                                           const TileCursor<T::kTileN, T::kMaxSources>& cursor) {
        const Source& source = cursor.current();
        const int position = cursor.position();
        const int left = cursor.keys_left();
        if constexpr (T::kBias) {
            const float inverse_scale = 1.0f / params.scale;
            const float* bias = params.bias + source.bias_first + cursor.tile * T::kTileN + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < T::kTileN / 2; i += 4) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float addend = 2 * i + 2 * (lane % 4) + e < left ? bias[2 * i + e] * inverse_scale : 0.0f;
                    scores[i + e] += addend;
                    scores[i + 2 + e] += addend;
                }
            }
        }
        if (mask::needed(item, source, position, left, T::kTileN, 64 * warpgroup, 64 * warpgroup + 63)) {
            const int own = row + lane / 4;
            mask::apply(scores, mask::visible(item, source, position, left, own),
                        mask::visible(item, source, position, left, own + 8), lane);
        }
        return state.exponentiate(scores, params.scale_log2);
    }

    __device__ __forceinline__ void run_item(const WorkRecord<T::kMaxSources>& record, u32 query_parity) {
        const WorkItem& item = record.item;
        float acc[T::kDimV / 2];
#pragma unroll
        for (int i = 0; i < T::kDimV / 2; ++i) acc[i] = 0.0f;
        state.reset();
        ptx::mbarrier_wait(barriers.query_full(), query_parity);

        if (item.tiles > 0) {
            float scores[T::kTileN / 2];
            u32 weights[T::kTileN / 4];
            TileCursor<T::kTileN, T::kMaxSources> cursor(record);
            wait_key();
            start_scores(scores);
            ptx::wgmma_wait<0>();
            ptx::pin(scores);
            release_key();
            soften(scores, item, cursor);  // the accumulators are still 0: nothing to rescale
            softmax::round_pairs<typename T::Element>(scores, weights);

#pragma unroll 1
            for (int tile = 1; tile < item.tiles; ++tile) {
                cursor.next();
                wait_key();
                if constexpr (T::kOverlap) {
                    wait_turn();
                    start_scores(scores);
                    wait_value();
                    start_output(acc, weights);
                    pass_turn();
                    ptx::wgmma_wait<1>();
                    ptx::pin(scores);
                    release_key();
                    const bool moved = soften(scores, item, cursor);
                    if (moved) {
                        ptx::wgmma_wait_all_in_branch();
                        ptx::pin(acc);
                        softmax::rescale_rows(acc, state.rescale);
                    } else {
                        ptx::wgmma_wait<0>();
                        ptx::pin(acc);
                    }
                    ptx::pin(weights);
                    release_value();
                } else {
                    wait_turn();
                    wait_value();
                    start_output(acc, weights);
                    start_scores(scores);
                    pass_turn();
                    ptx::wgmma_wait<0>();
                    ptx::pin(scores);
                    ptx::pin(acc);
                    ptx::pin(weights);
                    release_key();
                    release_value();
                    if (soften(scores, item, cursor)) softmax::rescale_rows(acc, state.rescale);
                }
                softmax::round_pairs<typename T::Element>(scores, weights);
            }
            release(barriers.query_empty());
            wait_value();
            start_output(acc, weights);
            ptx::wgmma_wait<0>();
            ptx::pin(acc);
            release_value();
        } else {
            release(barriers.query_empty());
        }
        write_rows<typename T::Element, T::kDimV, T::kBias>(params, record, acc, state, row, lane);
    }
};

template <class T>
__device__ __forceinline__ void run(const Params& params) {
    extern __shared__ __align__(1024) char smem[];
    const u32 smem_base = ptx::shared_address(smem);
    const Barriers<T> barriers{smem_base + T::kBarrierOffset};
    const int warp = ptx::warp_uniform(static_cast<int>(threadIdx.x) / kWarpThreads);
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;

    if (threadIdx.x == 0) {
        if (smem_base % ptx::kSwizzleAtomBytes != 0) __trap();  // the swizzle is a function of the address
        ptx::prefetch_tensor_map(&params.query_map);
        ptx::prefetch_tensor_map(&params.key_map[0]);
        ptx::prefetch_tensor_map(&params.value_map[0]);
        barriers.init();
    }
    __syncthreads();

    if (warp < 4) {
        ptx::registers_give<T::kProducerRegisters>();
        if (threadIdx.x == 0) produce<T>(params, smem, smem_base, barriers);
    } else {
        ptx::registers_take<T::kConsumerRegisters>();
        const int warpgroup = warp / 4 - 1;
        Consumer<T> consumer{params,
                             barriers,
                             smem_base + T::kKeyOffset,
                             smem_base + T::kValueOffset,
                             ptx::matrix_descriptor(smem_base + warpgroup * 64 * ptx::kPanelRowBytes, 0),
                             warpgroup,
                             lane,
                             16 * (warp - 4)};
        // The first consumer's first turn is given here; from then on each passes it to the next.
        if (warpgroup == T::kConsumers - 1) consumer.pass_turn();
        const auto* records = reinterpret_cast<const WorkRecord<T::kMaxSources>*>(smem + T::kRecordOffset);
        Ring<T::kRecordSlots> slot;
        for (int round = 0; round < params.rounds; ++round) {
            ptx::mbarrier_wait(barriers.record_full(slot.index), slot.parity);
            if (records[slot.index].item.rows == 0) break;
            consumer.run_item(records[slot.index], round & 1);
            slot.next();
        }
    }
}

}  // namespace adaattn::sm90_attn_fwd_f16
