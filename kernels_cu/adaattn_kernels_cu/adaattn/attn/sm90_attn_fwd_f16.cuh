// sm90_attn_fwd_f16.cuh -- exact attention forward, bf16 or f16, on Hopper's matrix unit.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block takes work items (work/work_item.cuh) one after the other: a tile of query
//              rows and the key tiles of its sources.
//              1. s = q k^T for a tile of keys.
//              2. s_j = -inf where the row does not see key j; with a softcap, tanh(rate s_j)
//                 before that (softmax/score_rule.cuh), and the cap for the scale from here on.
//              3. r <- max s, if it grew by more than the slack.
//              4. p_j = 2^(c s_j - c r), c = scale log2(e).
//              5. l <- l 2^(c r_old - c r) + sum_j p_j.
//              6. o <- o 2^(c r_old - c r) + p v.
//              7. After the last tile: out = o / l, lse = scale r + ln l; rows that saw no key: 0
//                 and -inf. A sink is added to l first.
//              8. Rows whose result is not finite are recomputed key by key (repair_row.cuh).
//              Step 1 of a tile and step 6 of the tile before it are in flight together while
//              step 4 runs, also across items. Source: FlashAttention-3, arXiv 2407.08608,
//              algorithm 2; the slack: softmax/slack.cuh.
// Numerics     q, k, v, p: bf16 or f16; s, o, r, l: f32. (r1) wgmma's f32 accumulation of s; (r2)
//              ex2.approx, 2 ulp; (r3) p to 16 bits; (r4) wgmma's accumulation of o; (r5) out to 16
//              bits. l sums p before r3.
// Tiles        Block: 64 kConsumers queries x kTileN keys. Warpgroup 0 gives its registers away;
//              one of its threads starts all copies (sm90_producer.cuh). Warpgroups 1 ..
//              kConsumers: 64 query rows each, m64nNk16, s = ss (both shared), o = rs (p in
//              registers).
// Shared mem   | name    | type   | shape                          | live                       |
//              | queries | 16 bit | kQueryStages x tile_m x dim_qk | opened .. item's scores    |
//              | keys    | 16 bit | kStages x tile_n x dim_qk      | copied .. scores           |
//              | values  | 16 bit | kStages x tile_n x dim_v       | copied .. output           |
//              | records | i32    | kRecordSlots                   | an item ahead .. written   |
//              16-bit tiles are panels of 64 columns, swizzled by 128 bytes. Nothing is aliased.
// Registers    Producer 24 or 32, consumers 240, 160 or 112 (2, 3, 4 of them); no spill in any
//              specialisation of tuning/sm90_attn_fwd_f16.py.
// Budget: registers<=168 spill_bytes=0 smem_bytes<=232448
// Barriers     | name               | kind     | arrivals           | producer -> consumer       |
//              | query, key, value  | mbarrier | full 1 + bytes     | copy engine -> consumers   |
//              |   full / empty     |          | empty 4 kConsumers | consumer warps -> copier   |
//              | record full        | mbarrier | 1 + bytes          | copy engine -> everyone    |
//              | record empty       | mbarrier | 128 kConsumers     | consumer threads -> copier |
//              | turn of consumer i | named    | 128 + 128 waiting  | consumer i - 1 -> i        |
//              Phases: count / stages (full), the same flipped (empty); one turn a tile.
// Limits       dim_qk, dim_v multiples of 8 up to 256, zero-padded to 64, 128, 192 or 256 by the
//              copy engine; 16-byte aligned rows; scale > 0; lengths up to kUnlimited; every item
//              has at least one key tile and at most kMaxSources sources (kFromTable: any number, read
//              from the table), is not partial, and
//              packs no heads. All checked by the host.
// Ladder       docs/kernels/sm90_attn_fwd_f16.md.
#pragma once

#include "adaattn/attn/sm90_epilogue.cuh"
#include "adaattn/attn/sm90_params.cuh"
#include "adaattn/attn/sm90_producer.cuh"
#include "adaattn/attn/sm90_skip.cuh"
#include "adaattn/common/format.cuh"
#include "adaattn/mask/sm90_mask.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/warpgroup.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/ptx/wgmma_f16.cuh"
#include "adaattn/softmax/online.cuh"
#include "adaattn/softmax/score_rule.cuh"
#include "adaattn/tile/ring.cuh"
#include "adaattn/tile/sm90_barriers.cuh"
#include "adaattn/work/tile_cursor.cuh"

namespace adaattn::sm90_attn_fwd_f16 {

using Params = AttentionParams;
using RuledParams = AttentionParams;

template <Format kFormatT, int kDimQkT, int kDimVT, int kConsumersT, int kTileNT, int kStagesT,
          int kQueryStagesT, int kPingPongT, int kRoleT, int kMaxSourcesT, int kSkipT>
struct Traits {
    using Params = AttentionParams;
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDimQk = kDimQkT;  // 64, 128, 192 or 256: the arrays' dims padded
    static constexpr int kDimV = kDimVT;
    static constexpr int kConsumers = kConsumersT;  // warpgroups of 64 query rows
    static constexpr int kTileM = 64 * kConsumers;
    static constexpr int kTileN = kTileNT;
    static constexpr int kStages = kStagesT;  // of keys, and of values
    static constexpr int kQueryStages =
        kQueryStagesT;  // 2: the next item's queries arrive during this item
    static constexpr bool kPingPong = kPingPongT != 0;  // consumers take turns at the matrix unit
    static constexpr int kRole = kRoleT;                // a Role
    static constexpr bool kSkip = kSkipT != 0;          // items may ask for score-then-skip
    static constexpr int kMaxSources = kMaxSourcesT;
    static constexpr bool kBiases = kRole == kAdaptive && kMaxSources > 1;  // of pooled keys

    static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

    static constexpr int kPanelsQk = kDimQk / ptx::kPanelColumns;
    static constexpr int kPanelsV = kDimV / ptx::kPanelColumns;
    static constexpr int kColumnsQk = ptx::kPanelColumns, kColumnsV = ptx::kPanelColumns;
    static constexpr bool kCodesQk = false, kCodesPv = false;  // operands as the caller has them
    static constexpr int kScaleBytes = 0;
    static constexpr int kQueryBytes = kTileM * kDimQk * 2;
    static constexpr int kKeyBytes = kTileN * kDimQk * 2;
    static constexpr int kValueBytes = kTileN * kDimV * 2;
    // Records alive at once: the item whose queries are loaded, those still in the other query
    // stages, one whose queries are all read but whose output is not yet written, and the one
    // fetched ahead: kQueryStages + 3, as a power of two.
    static constexpr int kRecordSlots = kQueryStages == 1 ? 4 : 8;
    static constexpr int kRecordBytes = static_cast<int>(sizeof(work::WorkRecord<kMaxSources>));
    static constexpr int kKeyOffset = kQueryStages * kQueryBytes;
    static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
    static constexpr int kRecordOffset = kValueOffset + kStages * kValueBytes;
    static constexpr int kBiasOffset = kRecordOffset + kRecordSlots * kRecordBytes;
    static constexpr int kBiasBytes = kBiases ? 4 * kStages * kTileN : 0;
    static constexpr int kBarrierOffset = kBiasOffset + kBiasBytes;
    static constexpr int kBarriers = 2 * kQueryStages + 4 * kStages + 2 * kRecordSlots;
    static constexpr int kSmemBytes = round_up(kBarrierOffset + 8 * kBarriers, 128);

    static_assert(kTileN % 16 == 0 && kTileN >= 64 && kTileN <= 256,
                  "one wgmma covers a tile's keys");
    static_assert(kConsumers >= 2 && kConsumers <= 4,
                  "register hand-over is tabled for 2, 3 and 4 consumers");
    static_assert(kSmemBytes <= 232448, "shared memory of one block on sm_90");
};

// ---- consumer: 64 query rows a warpgroup
// --------------------------------------------------------------------------------------

template <class T>
struct Consumer {
    using Record = work::WorkRecord<T::kMaxSources>;
    using RecordRing = tile::Ring<T::kRecordSlots>;
    using QueryRing = tile::Ring<T::kQueryStages>;
    using TileRing = tile::Ring<T::kStages>;
    static constexpr int kRestWords = T::kRole == kExactRows ? T::kTileN / 4 : 1;
    static_assert(softmax::rule_of<T>(0) == softmax::kPlain || (T::kRole == kDense && !T::kSkip),
                  "biases, partial results and skipping know no score rule");

    const Params& params;
    const tile::Barriers<T> barriers;
    const u32 smem;
    const Record* records;  // in shared memory
    const int warpgroup;    // 0 .. kConsumers - 1
    int items;              // opened so far
    int tiles;  // score tiles finished so far, over all items; one more than output tiles
    work::TileCursor<T::kTileN, T::kMaxSources> cursor;
    softmax::Online state;
    int stops[2];      // kExactRows: where this thread's two rows end
    int skipped_keys;  // of this item
    int first_stop;    // the least in the warpgroup

    // Read anew where needed: the main loop has no register to keep them in.
    ADAATTN_DEVICE int lane() const { return static_cast<int>(threadIdx.x) % kWarpThreads; }
    // First of this warp's 16 rows within the tile.
    ADAATTN_DEVICE int row() const {
        return 16 *
               (static_cast<int>(threadIdx.x) / kWarpThreads - kWarpgroupThreads / kWarpThreads);
    }
    ADAATTN_DEVICE void release(u32 empty_barrier) const {
        if (lane() == 0) ptx::mbarrier_arrive(empty_barrier);
    }
    // Turns keep one consumer's products together, so that its softmax falls under another's
    // products.
    ADAATTN_DEVICE void wait_turn() const {
        if constexpr (T::kPingPong)
            ptx::named_barrier_sync(kTurnOfFirstConsumer + warpgroup, 2 * kWarpgroupThreads);
    }
    ADAATTN_DEVICE void pass_turn() const {
        if constexpr (T::kPingPong) {
            const int next = warpgroup + 1 == T::kConsumers ? 0 : warpgroup + 1;
            ptx::named_barrier_arrive(kTurnOfFirstConsumer + next, 2 * kWarpgroupThreads);
        }
    }

    ADAATTN_DEVICE const Record& record(int item) const { return records[RecordRing::index(item)]; }

    // Moves to the next item, if there is one, and waits for its queries.
    ADAATTN_DEVICE bool open_item() {
        if (items == params.rounds) return false;
        ptx::mbarrier_wait(barriers.record_full(RecordRing::index(items)),
                           RecordRing::parity(items));
        if (record(items).item.rows == 0) return false;
        ptx::mbarrier_wait(barriers.query_full(QueryRing::index(items)), QueryRing::parity(items));
        cursor.open(record(items), params.sources);
        state.reset();
        if constexpr (T::kSkip) skipped_keys = 0;
        if constexpr (T::kRole == kExactRows) {
            // Rows are in ascending order of their limits.
            const i32* limits = params.row_stops + record(items).item.row_stops;
            stops[0] = limits[row() + lane() / 4];
            stops[1] = limits[row() + lane() / 4 + 8];
            first_stop = limits[64 * warpgroup];
        }
        ++items;
        return true;
    }

    // scores = Q K^T, started.
    ADAATTN_DEVICE void start_scores(float (&scores)[T::kTileN / 2]) const {
        const int query_stage = QueryRing::index(items - 1);
        const int stage = TileRing::index(tiles);
        const u64 queries = ptx::matrix_descriptor(
            smem + query_stage * T::kQueryBytes + warpgroup * 64 * ptx::kPanelRowBytes, 0);
        const u64 keys = ptx::matrix_descriptor(smem + T::kKeyOffset + stage * T::kKeyBytes, 0);
        ptx::mbarrier_wait(barriers.key_full(stage), TileRing::parity(tiles));
        int accumulate = 0;
        if constexpr (T::kBiases) {
            if (cursor.current().first_bias != work::kNoBias) {
                start_from_bias(scores, stage);
                accumulate = 1;
            }
        }
        wait_turn();
        ptx::pin(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kDimQk / 16; ++k) {
            ptx::Wgmma<T::kFormat, T::kTileN>::ss(
                scores, ptx::advance(queries, ptx::k_slice_bytes(k, T::kTileM)),
                ptx::advance(keys, ptx::k_slice_bytes(k, T::kTileN)), k != 0 ? 1 : accumulate);
        }
        ptx::wgmma_commit();
    }

    // Call when the scores are there: nothing reads this key tile, or after an item's last one its
    // queries, any more.
    ADAATTN_DEVICE void finish_scores(float (&scores)[T::kTileN / 2]) {
        ptx::pin(scores);
        release(barriers.key_empty(TileRing::index(tiles)));
        if (cursor.at_last()) release(barriers.query_empty(QueryRing::index(items - 1)));
        ++tiles;
    }

    // acc += P V, started.
    ADAATTN_DEVICE void start_output(float (&acc)[T::kDimV / 2], u32 (&weights)[T::kTileN / 4],
                                     u32 (&rest)[kRestWords]) const {
        const int stage = TileRing::index(tiles - 1);
        const u64 values = ptx::matrix_descriptor(smem + T::kValueOffset + stage * T::kValueBytes,
                                                  T::kTileN * ptx::kPanelRowBytes);
        ptx::mbarrier_wait(barriers.value_full(stage), TileRing::parity(tiles - 1));
        ptx::pin(acc);
        ptx::pin(weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kTileN / 16; ++k) {
            ptx::Wgmma<T::kFormat, T::kDimV>::rs(
                acc, &weights[4 * k], ptx::advance(values, 16 * k * ptx::kPanelRowBytes), 1);
        }
        if constexpr (T::kRole == kExactRows) {
            ptx::pin(rest);
#pragma unroll
            for (int k = 0; k < T::kTileN / 16; ++k) {
                ptx::Wgmma<T::kFormat, T::kDimV>::rs(
                    acc, &rest[4 * k], ptx::advance(values, 16 * k * ptx::kPanelRowBytes), 1);
            }
        }
        ptx::wgmma_commit();
    }

    // Call when the product of value tile number `tile` is there.
    ADAATTN_DEVICE void finish_output(float (&acc)[T::kDimV / 2], u32 (&weights)[T::kTileN / 4],
                                      int tile) const {
        ptx::pin(acc);
        ptx::pin(weights);
        release(barriers.value_empty(TileRing::index(tile)));
    }

    // The accumulators of a tile whose keys have biases start from them, in units of raw scores.
    ADAATTN_DEVICE void start_from_bias(float (&scores)[T::kTileN / 2], int stage) const {
        const u32 from = smem + T::kBiasOffset + (stage * T::kTileN + 2 * (lane() % 4)) * 4;
#pragma unroll
        for (int i = 0; i < T::kTileN / 2; i += 4) {
            float low, high;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(low), "=f"(high)
                         : "r"(from + 8 * i));
            scores[i] = scores[i + 2] = low * params.inverse_scale;
            scores[i + 1] = scores[i + 3] = high * params.inverse_scale;
        }
    }

    // Weights to 16 bits; for exact rows the rest as well, which brings them to twice the digits.
    ADAATTN_DEVICE static void round_weights(const float (&scores)[T::kTileN / 2],
                                             u32 (&weights)[T::kTileN / 4],
                                             u32 (&rest)[kRestWords]) {
        softmax::round_pairs<T::kFormat>(scores, weights);
        if constexpr (T::kRole == kExactRows) {
#pragma unroll
            for (int i = 0; i < T::kTileN / 4; ++i) {
                const float low = quant::widen<T::kFormat>(static_cast<u16>(weights[i] & 0xffffu));
                const float high = quant::widen<T::kFormat>(static_cast<u16>(weights[i] >> 16));
                rest[i] =
                    quant::pack_pair<T::kFormat>(scores[2 * i] - low, scores[2 * i + 1] - high);
            }
        }
    }

    ADAATTN_DEVICE bool mask_needed() const {
        if constexpr (T::kRole == kExactRows) {
            return smaller(first_stop - cursor.position(), cursor.keys_left()) < T::kTileN;
        }
        return mask::needed(cursor.item(), cursor.current(), cursor.position(), cursor.keys_left(),
                            T::kTileN, 64 * warpgroup, 64 * warpgroup + 63);
    }

    // A softcap comes before the mask, which hides what it made of a NaN.
    ADAATTN_DEVICE void hide(float (&scores)[T::kTileN / 2]) const {
        softmax::cap_scores<softmax::rule_of<T>(0)>(scores, params.softcap_rate);
        if (!mask_needed()) return;
        if constexpr (T::kRole == kExactRows) {
            const int left = cursor.keys_left();
            mask::apply_stops(scores, smaller(stops[0] - cursor.position(), left),
                              smaller(stops[1] - cursor.position(), left), lane());
        } else {
            mask::apply(scores, cursor.item(), cursor.current(), cursor.position(),
                        cursor.keys_left(), row() + lane() / 4, lane());
        }
    }

    // Scores to probabilities. Returns whether the accumulators must be multiplied by `factor`.
    ADAATTN_DEVICE bool soften(float (&scores)[T::kTileN / 2], bool fresh, float (&factor)[2]) {
        hide(scores);
        return state.exponentiate(scores, params.scale_log2, params.slack, fresh, factor);
    }

    // One loop over the tiles of all items: the scores of a tile and the output of the tile before
    // it are in flight together, also where the two belong to different items, so that only the
    // block's very first and last products stand alone.
    ADAATTN_DEVICE void run() {
        float acc[T::kDimV / 2];
        float scores[T::kTileN / 2];
        u32 weights[T::kTileN / 4];
        u32 rest[kRestWords];  // what rounding took from the weights
        // What each row of acc is to be multiplied by: to follow the reference, or to normalise.
        float factor[2];
        softmax::clear(acc);
        if (!open_item()) return;
        start_scores(scores);
        pass_turn();
        ptx::wgmma_wait<0>();
        finish_scores(scores);
        soften(scores, true, factor);
        round_weights(scores, weights, rest);

#pragma unroll 1
        while (true) {
            const bool boundary = cursor.at_last();
            if (boundary) {
                if constexpr (T::kSkip) count_skipped(*this);
                write_lse<T::kRole, softmax::rule_of<T>(0), T::kTileM>(
                    params, *cursor.record, state, row(), lane(), factor);
                if (!open_item()) break;
            } else {
                cursor.next(params.sources);
            }
            start_scores(scores);
            start_output(acc, weights, rest);
            pass_turn();
            ptx::wgmma_wait<1>();
            finish_scores(scores);
            hide(scores);
            const bool kept = T::kSkip ? boundary || vote(*this, scores) : true;
            bool moved = false;
            if (kept) {
                moved =
                    state.exponentiate(scores, params.scale_log2, params.slack, boundary, factor);
            }
            // Each arm waits for itself: a wait above the branch would be scheduled before the
            // exponentials that should hide it. The warps of a warpgroup agree on `boundary`, as a
            // wait demands, but not on `moved`.
            if (boundary) {
                ptx::wgmma_wait_all_in_branch();
                finish_output(acc, weights, tiles - 2);
                write_rows<T::kFormat, T::kDimV, T::kRole, softmax::rule_of<T>(0), T::kTileM>(
                    params, record(items - 2), acc, factor, row(), lane());
                ptx::mbarrier_arrive(barriers.record_empty(RecordRing::index(items - 2)));
                softmax::clear(acc);
            } else {
                ptx::wgmma_wait<0>();
                finish_output(acc, weights, tiles - 2);
                if (moved) softmax::rescale_rows(acc, factor);
            }
            if constexpr (T::kSkip) {
                if (!kept) scan<T>(*this, acc, scores, factor);
            }
            round_weights(scores, weights, rest);
        }
        start_output(acc, weights, rest);
        ptx::wgmma_wait<0>();
        finish_output(acc, weights, tiles - 1);
        write_rows<T::kFormat, T::kDimV, T::kRole, softmax::rule_of<T>(0), T::kTileM>(
            params, record(items - 1), acc, factor, row(), lane());
    }
};

// Everything around the consumers, which T's kernel may have derived from the one above.
template <class T, template <class> class ConsumerOf>
ADAATTN_DEVICE void run_roles(const typename T::Params& params) {
    extern __shared__ __align__(1024) char smem_bytes[];
    const u32 smem = ptx::shared_address(smem_bytes);
    const tile::Barriers<T> barriers{smem + T::kBarrierOffset};
    const auto* records =
        reinterpret_cast<const work::WorkRecord<T::kMaxSources>*>(smem_bytes + T::kRecordOffset);
    const int warp = ptx::warp_uniform(static_cast<int>(threadIdx.x) / kWarpThreads);

    SourceRun first_run = {};
    if (threadIdx.x == 0) {
        first_run = sources_of<T::kRole>(params, 0);  // on its way while the barriers are made
        if (smem % ptx::kSwizzleAtomBytes != 0)
            __trap();  // the swizzle is a function of the address
        ptx::prefetch_tensor_map(&params.query_map);
        ptx::prefetch_tensor_map(&params.key_map[0]);
        ptx::prefetch_tensor_map(&params.value_map[0]);
        barriers.init();
    }
    __syncthreads();

    if (warp < 4) {
        ptx::registers_give<T::kProducerRegisters>();
        if (threadIdx.x == 0) {
            Producer<T> producer{params, barriers, smem, records, first_run};
            producer.run();
        }
    } else {
        ptx::registers_take<T::kConsumerRegisters>();
        ConsumerOf<T> consumer{params, barriers, smem, records, warp / 4 - 1};
        // The first consumer's first turn is given here; from then on each passes it to the next.
        if (consumer.warpgroup == T::kConsumers - 1) consumer.pass_turn();
        consumer.run();
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    run_roles<T, Consumer>(params);
}

}  // namespace adaattn::sm90_attn_fwd_f16
