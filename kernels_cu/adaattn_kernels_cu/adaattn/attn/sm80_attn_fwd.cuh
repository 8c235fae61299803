// sm80_attn_fwd.cuh -- exact attention forward on any GPU from Ampere on (mma.sync + cp.async).
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block computes one tile of kTileM query rows of one head:
//                1. the rows' visible keys form one interval each; the block walks the key tiles
//                   that any of its rows sees, last tile first (a causal mask's cut tiles come
//                   first, while later copies are under way);
//                2. S = Q K^T; a softcap, if there is one (softmax/score_rule.cuh); masks, in the
//                   tiles that some row sees only partly;
//                3. online softmax in base 2 with a lazy reference (softmax/row_state.cuh);
//                4. O = alpha O + P V;
//                5. out = O / sum, lse = ln(sum) + reference; a sink is added to sum first.
//              Source: Milakov & Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691.
// Numerics     Q, K in kQk; V and P in kPv; scores, softmax and accumulators f32. Rounding points:
//              (r1) operands, when the format is narrower than the input; (r2) products and sums of
//              Q K^T; (r3) 2^x, relative 2^-22; (r4) P to kPv, the row sum keeps unrounded P;
//              (r5) products and sums of P V; (r6) out to the input type. f32 is three tf32
//              products. The tensor core truncates when it accumulates, so 32-bit formats add short
//              partial sums (kFlushSteps steps of Q K^T, one key tile of P V) to round-to-nearest
//              accumulators.
// Tiles        kTileM x kTileN per block, m16n8k16 (16-bit) or m16n8k8 (32-bit); kWarps warps of
//              kTileM / kWarps rows each; K and V tiles are shared by all warps.
// Shared mem   | name | type | shape                       | swizzle | live          |
//              | Q    | kQk  | kTileM x kDimQk             | 8 rows  | whole block   |
//              | K[s] | kQk  | kTileN x kDimQk, s < kStages | 8 rows  | one key tile  |
//              | V[s] | kPv  | kTileN x kDimV, s < kStages  | 8 rows  | one key tile  |
//              | rest | -    | 80 of 128 bytes: sources, item, whole tiles    | whole block   |
//              Nothing is aliased; kSmemBytes is their sum.
// Registers    O takes kTileM kDimV / (32 kWarps) of them, S kTileM kTileN / (32 kWarps).
// Barriers     Block barriers only. Two stages: one per key tile, after the wait for its copies: it
//              publishes the tile and frees the stage that the next copy fills. One stage: a second
//              one before V is read, which frees K.
// Limits       The host has checked: lengths <= 2^29, dim_qk <= kDimQk, dim_v <= kDimV; kVectorised
//              only where every row begins on a 16-byte boundary and holds whole 16-byte chunks.
// Ladder       docs/kernels/sm80_attn_fwd.md
//
// Budget: registers<=255 spill_bytes=0 smem_bytes<=232448
#pragma once

#include "adaattn/attn/sm80_epilogue.cuh"
#include "adaattn/attn/sm80_params.cuh"
#include "adaattn/attn/sm80_sources.cuh"
#include "adaattn/mask/sm80_mask.cuh"
#include "adaattn/mask/sm80_nonfinite.cuh"
#include "adaattn/mma/sm80_products.cuh"
#include "adaattn/softmax/row_state.cuh"
#include "adaattn/softmax/score_rule.cuh"
#include "adaattn/tile/sm80_tile.cuh"
#include "adaattn/work/shared_item.cuh"
#include "adaattn/work/units.cuh"

namespace adaattn::sm80_attn_fwd {

template <Format kInput_, Format kQk_, Format kPv_, int kTileM_, int kTileN_, int kDimQk_,
          int kDimV_, int kWarps_, int kStages_, bool kArrayMask_, bool kVectorised_,
          bool kListed_ = false>
struct Traits {
    static constexpr Format kInput = kInput_, kQk = kQk_, kPv = kPv_;
    static constexpr int kTileM = kTileM_, kTileN = kTileN_;
    static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
    static constexpr int kWarps = kWarps_, kStages = kStages_;
    static constexpr bool kArrayMask = kArrayMask_, kVectorised = kVectorised_;
    static constexpr bool kListed = kListed_;  // items and sources are in tables
    static constexpr int kThreads = 32 * kWarps;

    using QueryTile = tile::Tile<kQk, kTileM, kDimQk>;
    using KeyTile = tile::Tile<kQk, kTileN, kDimQk>;
    using ValueTile = tile::Tile<kPv, kTileN, kDimV>;
    static constexpr int kQueryAt = 0;
    static constexpr int kKeyAt = kQueryAt + QueryTile::kBytes;
    static constexpr int kValueAt = kKeyAt + kStages * KeyTile::kBytes;
    static constexpr int kSourceAt = kValueAt + kStages * ValueTile::kBytes;
    static constexpr int kItemAt = kSourceAt + 32;
    static constexpr int kRangeAt = kItemAt + work::kSharedItemBytes;
    static constexpr int kSmemBytes = kSourceAt + 128;

    // A copy needs no conversion when the stored types agree (tf32 and f32 are both stored as f32).
    __host__ __device__ static constexpr bool same_storage(Format operand) {
        return operand == kInput || (kInput == Format::f32 && !is_narrow(operand));
    }
    static constexpr bool kAsyncQk = kVectorised && same_storage(kQk);
    static constexpr bool kAsyncPv = kVectorised && same_storage(kPv);

    static constexpr int kRowsPerWarp = kTileM / kWarps;
    static constexpr int kRowTiles = kRowsPerWarp / 16;
    static constexpr int kKeyTiles = kTileN / 8;
    static constexpr int kValueTiles = kDimV / 8;
    static constexpr int kQkSteps = kDimQk * storage_bytes(kQk) / 32;
    static constexpr int kFlushSteps = 4;  // of Q K^T in 32-bit formats

    static_assert(kInput != Format::tf32, "tf32 is an operand format, arrays hold f32");
    static_assert(kTileM % (16 * kWarps) == 0, "every warp owns whole 16-row fragments");
    static_assert(kStages == 1 || kStages == 2, "one or two K/V stages");
};

// y = tanh(rate s), ahead of every mask.
template <class T>
ADAATTN_DEVICE void cap_scores(mma::Scores<T>& scores, float rate) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                scores[m][n][e] = softmax::capped<is_narrow(T::kQk)>(scores[m][n][e], rate);
            }
        }
    }
}

// Adds what the columns' keys have to add, in scaled units; `bias` is the lane's first column's.
template <class T>
ADAATTN_DEVICE void add_bias(mma::Scores<T>& scores, const float* bias, float inverse_scale) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float added = bias[8 * n + e] * inverse_scale;
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
                scores[m][n][e] += added;
                scores[m][n][2 + e] += added;
            }
        }
    }
}

template <class T, class ParamsT>
ADAATTN_DEVICE void run(const ParamsT& params) {
    using QueryTile = typename T::QueryTile;
    using KeyTile = typename T::KeyTile;
    using ValueTile = typename T::ValueTile;

    const u32 shared = ptx::shared_base();
    work::UnitWork own;
    if constexpr (T::kListed) {
        own.item = params.items[ptx::block_index()];
    } else {
        own = work::work_of_block<T::kTileM>(params.work, static_cast<int>(ptx::block_index()));
    }
    if (own.item.rows <= 0) {
        return;
    }
    const int lane = ptx::thread_index() & 31;
    const int warp_row = (ptx::thread_index() / 32) * T::kRowsPerWarp;
    mma::Output<T> out;
    mma::clear<T::kRowTiles, T::kValueTiles>(out);
    softmax::RowState<T::kRowTiles> state;
    state.reset();
    u32 saw = 0;  // rows that saw a key, under array masks
    const float scale = T::kArrayMask ? kLog2E : params.score_scale;
    const u32 query_lane = tile::row_operand<QueryTile>(shared + T::kQueryAt, warp_row, lane);
    int stage = 0;

    // All key tiles of one source, in whose coordinates the item's interval is.
    bool opens = true;  // no source has been walked
    const auto walk = [&](const work::WorkItem& item, const work::Source& source) {
        // The tiles that any row sees.
        const mask::Interval of_first = mask::visible(item, 0);
        const mask::Interval of_last = mask::visible(item, item.rows - 1);
        const mask::Interval visit = {of_first.start, of_last.stop};
        const int tile_begin = visit.start / T::kTileN;
        const int tile_end =
            visit.stop > visit.start ? ceil_div(visit.stop, T::kTileN) : tile_begin;

        if constexpr (T::kListed) {
            if (tile_end <= tile_begin) return;
            if (!opens) ptx::block_sync();  // every warp is done with the source before
        }
        const i64 batch = item.batch, head_kv = source.head;
        i64 key_row = params.key_row, value_row = params.value_row;
        const auto at = [](const void* base, i64 element) -> const void* {
            return static_cast<const char*>(base) + element * storage_bytes(T::kInput);
        };
        const void* key = at(params.key, batch * params.key_batch + head_kv * params.key_head +
                                             source.first_key * params.key_row);
        const void* value =
            at(params.value, batch * params.value_batch + head_kv * params.value_head +
                                 source.first_key * params.value_row);
        [[maybe_unused]] const float* bias = nullptr;
        if constexpr (T::kListed) {
            if (source.tensor != work::kOriginal) {
                const FurtherRows& rows = params.further[source.tensor - 1];
                key_row = params.dim_qk;
                value_row = params.dim_v;
                key = at(rows.key, source.first_key * key_row);
                value = at(rows.value, source.first_key * value_row);
            }
            if (source.first_bias != work::kNoBias) bias = params.bias_of_keys + source.first_bias;
        }
        // What a fill needs rests in shared memory meanwhile: the main loop has no registers to spare.
        if (ptx::thread_index() == 0) {
            tile::store_fill_source(shared + T::kSourceAt, {key, value, visit.start, visit.stop});
            work::store_item(shared + T::kItemAt, item);
            const u32 range[4] = {static_cast<u32>(tile_begin),
                                  static_cast<u32>(ceil_div(of_last.start, T::kTileN)),
                                  static_cast<u32>(of_first.stop / T::kTileN), 0u};
            ptx::store_shared_128(shared + T::kRangeAt, range);
        }
        ptx::block_sync();  // the source is there before any thread fills
        // The first tile (0), and those that every row sees whole: from (1) up to (2). Read again after
        // every tile with a mask, which has no registers to keep them in.
        const auto range = [&](int word) {
            return static_cast<int>(ptx::load_shared_32(shared + T::kRangeAt + 4 * word));
        };
        const auto fill_key = [&](int tile, int stage) {
            const tile::FillSource from = tile::load_fill_source(shared + T::kSourceAt);
            const tile::Filler<KeyTile, T::kQk, T::kInput, T::kAsyncQk, T::kThreads> keys(
                from.key, key_row, params.dim_qk);
            keys.fill(shared + T::kKeyAt + stage * KeyTile::kBytes, tile * T::kTileN, from.start,
                      from.stop);
        };
        const auto fill_value = [&](int tile, int stage) {
            const tile::FillSource from = tile::load_fill_source(shared + T::kSourceAt);
            const tile::Filler<ValueTile, T::kPv, T::kInput, T::kAsyncPv, T::kThreads> values(
                from.value, value_row, params.dim_v);
            values.fill(shared + T::kValueAt + stage * ValueTile::kBytes, tile * T::kTileN,
                        from.start, from.stop);
        };

        const mask::ArrayMask arrays(params, item, source);

        int tile = tile_end - 1;
        if (tile >= tile_begin) {
            const tile::Filler<QueryTile, T::kQk, T::kInput, T::kAsyncQk, T::kThreads> queries(
                at(params.query, batch * params.query_batch + item.head * params.query_head +
                                     item.row_first * params.query_row),
                params.query_row, params.dim_qk);
            if (!T::kListed || opens) queries.fill(shared + T::kQueryAt, 0, 0, item.rows);
            fill_key(tile, stage);
            ptx::copy_async_commit();
            if constexpr (T::kStages == 2) {
                fill_value(tile, stage);
                ptx::copy_async_commit();
            }
        }

        // One key tile. Where every row sees all of it (not `cut`) there is nothing to mask; kMayCut =
        // false leaves that code out. `begin` is the first tile.
        const auto visit_tile = [&](auto may_cut, bool cut, int begin) {
            constexpr bool kMayCut = decltype(may_cut)::value;
            const u32 key_tile = shared + T::kKeyAt + stage * KeyTile::kBytes;
            const u32 value_tile = shared + T::kValueAt + stage * ValueTile::kBytes;
            const int first_key = tile * T::kTileN;
            const auto separate = [&] {
                if constexpr (kMayCut) {
                    if (cut &&
                        ptx::block_sync_or(
                            mask::holds_nonfinite<ValueTile, T::kPv, T::kThreads>(value_tile))) {
                        mask::separate_nonfinite<T>(out, value_tile,
                                                    work::load_item(shared + T::kItemAt), arrays,
                                                    warp_row, first_key);
                    }
                }
            };

            ptx::copy_async_wait<0>();
            // This tile has arrived for all; all are done with the buffers filled next.
            ptx::block_sync();
            if constexpr (T::kStages == 2) {
                if (tile > begin) {
                    fill_key(tile - 1, stage ^ 1);
                    fill_value(tile - 1, stage ^ 1);
                }
                ptx::copy_async_commit();
                separate();
            } else {
                fill_value(tile, 0);
                ptx::copy_async_commit();
                if (kMayCut && cut) {  // V is looked at before the scores need their registers
                    ptx::copy_async_wait<0>();
                    ptx::block_sync();  // V has arrived for all
                    separate();
                }
            }

            mma::Scores<T> scores;
            mma::compute_scores<T>(scores, query_lane,
                                   tile::column_operand<KeyTile>(key_tile, lane));

            if constexpr (T::kStages == 1) {
                ptx::copy_async_wait<0>();
                ptx::
                    block_sync();  // V has arrived for all; all are done with K, which is filled next
                if (tile > begin) {
                    fill_key(tile - 1, 0);
                }
                ptx::copy_async_commit();
            }

            if constexpr (T::kListed && !T::kArrayMask) {
                if (bias != nullptr) {
                    add_bias<T>(scores, bias + first_key + 2 * (lane & 3), params.inverse_scale);
                }
            }
            if constexpr ((softmax::rule_of<T>(0) & softmax::kSoftcap) != 0) {
                cap_scores<T>(scores, params.softcap_rate);
            }
            if constexpr (kMayCut) {
                if (cut) {
                    mask::mask_scores<T>(scores, work::load_item(shared + T::kItemAt), arrays,
                                         params.score_scale, saw, warp_row, first_key);
                }
            }
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
                float alpha[2];
                if (state.update(m, scores[m], scale, alpha)) {
                    mma::rescale(out[m], alpha);
                }
            }
            if constexpr (is_narrow(T::kPv)) {
                mma::add_values_narrow<T>(out, scores,
                                          tile::row_operand<ValueTile>(value_tile, 0, lane));
            } else {
                mma::add_values_wide<T>(out, scores, value_tile);
            }
            if constexpr (T::kStages == 2) {
                stage ^= 1;
            }
        };
        while (tile >= range(0)) {
            const int begin = range(0), whole_begin = range(1), whole_end = range(2);
            // The narrow formats are fast enough, and short enough of registers, to earn a loop of
            // their own for whole tiles.
            if constexpr (!T::kArrayMask && is_narrow(T::kPv)) {
                for (; tile >= whole_begin && tile < whole_end; --tile) {
                    visit_tile(Flag<false>{}, false, begin);
                }
            }
            if (tile >= begin) {
                const bool cut = T::kArrayMask || tile < whole_begin || tile >= whole_end;
                visit_tile(Flag<true>{}, cut, range(0));
                --tile;
            }
        }
        opens = false;
    };
    if constexpr (T::kListed) {
#pragma unroll 1
        for (int index = own.item.sources - 1; index >= 0; --index) {
            const work::Source source = params.sources[own.item.first_source + index];
            walk(item_within(own.item, source), source);
        }
    } else {
        walk(own.item, own.source);
    }
    state.finish();
    if constexpr (T::kListed) {
        if constexpr (!T::kArrayMask) saw = rows_that_see<T>(params, own.item, state, warp_row);
        store_rows<T>(out, state, params, own.item, saw, scale);
        return;
    }
    store_rows<T>(out, state, params, work::load_item(shared + T::kItemAt), saw, scale);
}

}  // namespace adaattn::sm80_attn_fwd
