// sm80_attn_bwd.cuh -- gradients of exact attention on any GPU from Ampere on (mma.sync).
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block owns a tile of kRows rows of one side (queries with their output
//              gradients, or keys with their values) and walks over the tiles of the other side
//              that any of its rows sees; own keys see every query head of their group. With
//              s = q k^T, dp = do v^T, p and delta from the rows' records:
//                1. s, dp of own rows x streamed rows (one product each);
//                2. p_ij = 2^((s_ij - top_i) c) inverse_i, 0 where i does not see j;
//                3. ds_ij = p_ij (dp_ij - delta_i), under a softcap times 1 - y_ij^2, where y =
//                   tanh(rate s) and c the cap;
//                4. own queries: dq += ds k. Own keys: dk += ds^T q, dv += p^T do.
//              After the last tile dq and dk are multiplied by the scale and written.
//              Nothing is added to memory, so the same bits come every time; the price is that s
//              and dp are computed twice, once for each side.
//              kStatistics: own queries, step 1 and an online softmax instead of 2 to 4, for rows
//              whose lse is so large that it has lost the digits of the row's sum (masks of the
//              lowest finite number, scores of thousands); their records get the pair (top, sum).
//              Source: Dao, arXiv 2307.08691, section 3.1.2 (its recurrence, not its order).
// Numerics     Products in kMul; s, dp, softmax and accumulators f32. Rounding points: (r1)
//              operands, exact where the input has their format; (r2) products and sums of s, dp;
//              (r3) 2^x, relative 2^-22; (r4) p and ds to kMul; (r5) products and sums of dq, dk,
//              dv; (r6) gradients to the input type. f32 is three tf32 products, in short partial
//              sums (mma/sm80_products.cuh).
// Tiles        kRows x kColumns per block, m16n8k16 (16-bit) or m16n8k8 (32-bit); kWarps warps of
//              kRows / kWarps own rows each; streamed tiles are shared by all warps.
// Shared mem   | name       | type      | shape                        | live          |
//              | own        | kMul      | kRows x (kDimQk + kDimV)     | whole block   |
//              | streamed s | kMul      | kColumns x (kDimQk + kDimV)  | one tile      |
//              | records s  | RowRecord | kColumns, where keys are own | one tile      |
//              | rest       | -         | 64 bytes: item and walk      | whole block   |
//              Tiles are swizzled by 8 rows; s < kStages. Nothing is aliased.
// Registers    Accumulators take kRows (kDimQk + kDimV) / (32 kWarps) of them, s and dp
//              kRows kColumns / (16 kWarps).
// Barriers     Block barriers only: one per streamed tile after the wait for its copies, which with
//              two stages also frees the stage that is filled next; with one stage a second one
//              before the next fill.
// Limits       The host has checked: lengths <= 2^29, dim_qk <= kDimQk, dim_v <= kDimV; kVectorised
//              only where every row begins on a 16-byte boundary and holds whole 16-byte chunks.
// Ladder       docs/kernels/sm80_attn_bwd.md
//
// Budget: registers<=255 spill_bytes=0 smem_bytes<=232448
#pragma once

#include "adaattn/attn/sm80_bwd_params.cuh"
#include "adaattn/attn/sm80_bwd_weights.cuh"
#include "adaattn/attn/sm80_epilogue.cuh"
#include "adaattn/mask/sm80_nonfinite.cuh"
#include "adaattn/mma/sm80_products.cuh"
#include "adaattn/softmax/row_state.cuh"
#include "adaattn/tile/sm80_tile.cuh"
#include "adaattn/work/shared_item.cuh"

namespace adaattn::sm80_attn_bwd {

// Which gradients a launch computes; long rows take one launch each for keys and values.
enum Output : int { kQuery = 0, kKeyValue = 1, kKey = 2, kValue = 3, kStatistics = 4 };

template <Format kInput_, Format kMul_, int kOutput_, int kRows_, int kColumns_, int kDimQk_,
          int kDimV_, int kWarps_, int kStages_, bool kArrayMask_, bool kVectorised_>
struct Traits {
    static constexpr Format kInput = kInput_, kMul = kMul_;
    static constexpr int kOutput = kOutput_;
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
    static constexpr int kWarps = kWarps_, kStages = kStages_;
    static constexpr bool kArrayMask = kArrayMask_, kVectorised = kVectorised_;
    static constexpr int kThreads = 32 * kWarps;

    static constexpr bool kOwnKeys = kOutput == kKeyValue || kOutput == kKey || kOutput == kValue;
    static constexpr bool kWantsFirst =
        kOutput == kQuery || kOutput == kKeyValue || kOutput == kKey;
    static constexpr bool kWantsSecond = kOutput == kKeyValue || kOutput == kValue;
    static constexpr bool kUsesSecond = kWantsFirst || kWantsSecond;  // do and v are read at all
    static constexpr bool kUsesOwnSecond = kWantsFirst;

    using OwnFirst = tile::Tile<kMul, kRows, kDimQk>;
    using OwnSecond = tile::Tile<kMul, kRows, kDimV>;
    using First = tile::Tile<kMul, kColumns, kDimQk>;
    using Second = tile::Tile<kMul, kColumns, kDimV>;
    static constexpr int kRecordBytes =
        kOwnKeys ? kColumns * static_cast<int>(sizeof(RowRecord)) : 0;
    static constexpr int kOwnSecondAt = OwnFirst::kBytes;
    static constexpr int kFirstAt = kOwnSecondAt + (kUsesOwnSecond ? OwnSecond::kBytes : 0);
    static constexpr int kSecondAt = kFirstAt + kStages * First::kBytes;
    static constexpr int kRecordAt = kSecondAt + (kUsesSecond ? kStages * Second::kBytes : 0);
    static constexpr int kItemAt = kRecordAt + kStages * kRecordBytes;
    static constexpr int kWalkAt = kItemAt + work::kSharedItemBytes;
    static constexpr int kSmemBytes = kWalkAt + 32;

    static constexpr bool kAsync =
        kVectorised && (kMul == kInput || (kInput == Format::f32 && !is_narrow(kMul)));
    static constexpr int kRowsPerWarp = kRows / kWarps;
    static constexpr int kRowTiles = kRowsPerWarp / 16;

    static_assert(kInput != Format::tf32, "tf32 is an operand format, arrays hold f32");
    static_assert(kRows % (16 * kWarps) == 0, "every warp owns whole 16-row fragments");
    static_assert(kColumns % 16 == 0, "streamed tiles are made of 16-row fragments");

    // The products of mma/sm80_products.cuh, as it wants them described: kFirst between the first
    // arrays of both sides, else between the second ones.
    template <bool kOfFirst>
    struct Product {
        static constexpr Format kQk = kMul, kPv = kMul;
        static constexpr bool kArrayMask = kArrayMask_;
        static constexpr int kThreads = 32 * kWarps_, kRowsPerWarp = kRows / kWarps;
        static constexpr int kRowTiles = kRowsPerWarp / 16, kTileN = kColumns;
        static constexpr int kKeyTiles = kColumns / 8;
        static constexpr int kDim = kOfFirst ? kDimQk : kDimV;
        static constexpr int kValueTiles = kDim / 8;
        static constexpr int kQkSteps = kDim * storage_bytes(kMul) / 32;
        static constexpr int kFlushSteps = 4;
        using QueryTile = tile::Tile<kMul, kRows, kDim>;
        using KeyTile = tile::Tile<kMul, kColumns, kDim>;
        using ValueTile = KeyTile;
    };
    using OfFirst = Product<true>;
    using OfSecond = Product<false>;
};

// Which streamed tiles a block walks over, at rest in shared memory: the main loop has no registers
// to keep it in.
struct Walk {
    int begin, end;              // the tiles that any own row sees, once for each streamed head
    int whole_begin, whole_end;  // those that every own row sees whole
    int first_key, keys;         // the streamed rows that exist
    int first_head;
    int count;

    ADAATTN_DEVICE void store(u32 address) const {
        const u32 tiles[4] = {static_cast<u32>(begin), static_cast<u32>(end),
                              static_cast<u32>(whole_begin), static_cast<u32>(whole_end)};
        const u32 rest[4] = {static_cast<u32>(first_key), static_cast<u32>(keys),
                             static_cast<u32>(first_head), static_cast<u32>(count)};
        ptx::store_shared_128(address, tiles);
        ptx::store_shared_128(address + 16, rest);
    }
    ADAATTN_DEVICE static Walk load(u32 address) {
        u32 tiles[4], rest[4];
        ptx::load_shared_128(tiles, address);
        ptx::load_shared_128(rest, address + 16);
        return {static_cast<int>(tiles[0]), static_cast<int>(tiles[1]), static_cast<int>(tiles[2]),
                static_cast<int>(tiles[3]), static_cast<int>(rest[0]),  static_cast<int>(rest[1]),
                static_cast<int>(rest[2]),  static_cast<int>(rest[3])};
    }
};

template <class T>
ADAATTN_DEVICE Walk walk_of(const work::UnitWork& own, int group) {
    const mask::Interval of_first = mask::visible(own.item, 0);
    const mask::Interval of_last = mask::visible(own.item, own.item.rows - 1);
    Walk walk;
    walk.begin = of_first.start / T::kColumns;
    walk.end = of_last.stop > of_first.start ? ceil_div(of_last.stop, T::kColumns) : walk.begin;
    walk.whole_begin = ceil_div(of_last.start, T::kColumns);
    walk.whole_end = of_first.stop / T::kColumns;
    walk.first_key = own.source.first_key;
    walk.keys = own.source.keys;
    walk.first_head = own.source.head * group;
    walk.count = (walk.end - walk.begin) * group;
    return walk;
}

// Starts the copies of one tile of a side: `rows` of them exist from array row `first_row` on.
template <class T, class FirstTile, class SecondTile, bool kSecond>
ADAATTN_DEVICE void fill_side(const Params& params, const Side& side, i64 batch, i64 head,
                              i64 first_row, int rows, u32 first_at, u32 second_at) {
    const auto at = [](const void* base, i64 element) -> const void* {
        return static_cast<const char*>(base) + element * storage_bytes(T::kInput);
    };
    const tile::Filler<FirstTile, T::kMul, T::kInput, T::kAsync, T::kThreads> first(
        at(side.first,
           batch * side.first_batch + head * side.first_head + first_row * side.first_row),
        side.first_row, params.dim_qk);
    first.fill(first_at, 0, 0, rows);
    if constexpr (kSecond) {
        const tile::Filler<SecondTile, T::kMul, T::kInput, T::kAsync, T::kThreads> second(
            at(side.second,
               batch * side.second_batch + head * side.second_head + first_row * side.second_row),
            side.second_row, params.dim_v);
        second.fill(second_at, 0, 0, rows);
    }
}

// Writes one accumulator to contiguous rows of `dim` columns.
template <class T, int kColumnTiles>
ADAATTN_DEVICE void store_gradient(const mma::Accumulator<T::kRowTiles, kColumnTiles>& acc,
                                   void* array, i64 row_zero, int rows, int dim, float factor) {
    const int lane = ptx::thread_index() & 31;
    const int first_row = ptx::thread_index() / 32 * T::kRowsPerWarp;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            char* to =
                static_cast<char*>(array) + (row_zero + row) * dim * storage_bytes(T::kInput);
#pragma unroll
            for (int n = 0; n < kColumnTiles; n += 2) {
                const float x[2] = {acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor};
                const float y[2] = {acc[m][n + 1][2 * half] * factor,
                                    acc[m][n + 1][2 * half + 1] * factor};
                sm80_attn_fwd::store_columns<T>(to, 8 * n, x, y, dim, row < rows);
            }
        }
    }
}

template <class T>
ADAATTN_DEVICE void run_block(const Params& params, int block) {
    using OfFirst = typename T::OfFirst;
    using OfSecond = typename T::OfSecond;

    const u32 shared = ptx::shared_base();
    const int lane = ptx::thread_index() & 31;
    const int warp_row = (ptx::thread_index() / 32) * T::kRowsPerWarp;
    RowRecord own_rows[T::kRowTiles][2];  // of own queries: two rows of every row tile
    {
        const work::UnitWork own = work::work_of_block<T::kRows>(params.work, block);
        const work::WorkItem& item = own.item;
        if (item.rows <= 0) return;
        bool far = false;
        if constexpr (!T::kOwnKeys) {
            far = load_own_rows<T>(own_rows,
                                   records_of(params, item.batch, item.head, item.row_first),
                                   warp_row, item.rows, params.score_scale);
        }
        if constexpr (T::kOutput == kStatistics) {
            if (!ptx::block_sync_or(far)) return;
        }
        if (ptx::thread_index() == 0) {
            walk_of<T>(own, params.group).store(shared + T::kWalkAt);
            work::store_item(shared + T::kItemAt, item);
        }
        fill_side<T, typename T::OwnFirst, typename T::OwnSecond, T::kUsesOwnSecond>(
            params, params.own, item.batch, item.head, item.row_first, item.rows, shared,
            shared + T::kOwnSecondAt);
    }
    const auto load_item = [&] { return work::load_item(shared + T::kItemAt); };
    const auto load_walk = [&] { return Walk::load(shared + T::kWalkAt); };
    const auto fill_streamed = [&](int tile, int head, int stage) {
        const Walk walk = load_walk();
        const i64 batch = load_item().batch;
        const int row = tile * T::kColumns;
        fill_side<T, typename T::First, typename T::Second, T::kUsesSecond>(
            params, params.streamed, batch, head, walk.first_key + row, walk.keys - row,
            shared + T::kFirstAt + stage * T::First::kBytes,
            shared + T::kSecondAt + stage * T::Second::kBytes);
        if constexpr (T::kOwnKeys) {
            fill_records<T>(shared + T::kRecordAt + stage * T::kRecordBytes,
                            records_of(params, batch, head, walk.first_key + row), walk.keys - row);
        }
    };
    ptx::block_sync();  // item and walk are there before any thread reads them

    mma::Output<OfFirst> d_first;
    mma::Output<OfSecond> d_second;
    if constexpr (T::kWantsFirst) mma::clear<T::kRowTiles, OfFirst::kValueTiles>(d_first);
    if constexpr (T::kWantsSecond) mma::clear<T::kRowTiles, OfSecond::kValueTiles>(d_second);
    softmax::RowState<T::kRowTiles> state;
    if constexpr (T::kOutput == kStatistics) state.reset();

    const u32 first_lane = tile::row_operand<typename T::OwnFirst>(shared, warp_row, lane);
    const u32 second_lane =
        tile::row_operand<typename T::OwnSecond>(shared + T::kOwnSecondAt, warp_row, lane);
    int tile = load_walk().begin, head = load_walk().first_head, stage = 0;
    int left = load_walk().count;
    if (left > 0) fill_streamed(tile, head, 0);
    ptx::copy_async_commit();

#pragma unroll 1
    for (; left > 0; --left) {
        ptx::copy_async_wait<0>();
        ptx::block_sync();  // this tile has arrived for all; all are done with the other stage
        const auto fill_next = [&](int to) {
            const Walk walk = load_walk();
            const bool wraps = tile + 1 == walk.end;
            if (left > 1) fill_streamed(wraps ? walk.begin : tile + 1, head + wraps, to);
            ptx::copy_async_commit();
        };
        if constexpr (T::kStages == 2) fill_next(stage ^ 1);

        const u32 first_tile = shared + T::kFirstAt + stage * T::First::kBytes;
        const u32 second_tile = shared + T::kSecondAt + stage * T::Second::kBytes;
        const int first_column = tile * T::kColumns;
        mma::Scores<OfFirst> weights;
        mma::compute_scores<OfFirst>(weights, first_lane,
                                     tile::column_operand<typename T::First>(first_tile, lane));

        if constexpr (is_capped(softmax::rule_of<T>(0))) {
            cap_scores<T>(weights, params.softcap_rate);
        }

        const bool cut =
            T::kArrayMask || tile < load_walk().whole_begin || tile >= load_walk().whole_end;
        const auto load_arrays = [&] {
            work::WorkItem of_query = load_item();  // array masks belong to query heads
            if (T::kOwnKeys) of_query.head = head;
            work::Source source = {};
            source.first_key = load_walk().first_key;
            return mask::ArrayMask(params, of_query, source);
        };
        if constexpr (T::kOutput == kStatistics) {
            u32 saw = 0;
            if (cut) {
                mask::mask_scores<OfFirst>(weights, load_item(), load_arrays(), params.scale, saw,
                                           warp_row, first_column);
            }
#pragma unroll
            for (int m = 0; m < T::kRowTiles; ++m) {
                float alpha[2];
                state.update(m, weights[m], params.score_scale, alpha);
            }
        } else {
            mma::Scores<OfSecond> d_scores;
            if constexpr (T::kWantsFirst) {
                mma::compute_scores<OfSecond>(
                    d_scores, second_lane,
                    tile::column_operand<typename T::Second>(second_tile, lane));
            }
            const u32 records = shared + T::kRecordAt + stage * T::kRecordBytes;
            if (cut) {
                weigh<T, true>(weights, d_scores, own_rows, records, load_item(), load_arrays(),
                               params, warp_row, first_column);
            } else {
                weigh<T, false>(weights, d_scores, own_rows, records, load_item(), load_arrays(),
                                params, warp_row, first_column);
            }
            if constexpr (T::kArrayMask && T::kOutput == kQuery) {
                if (params.d_bias != nullptr) {
                    add_bias_gradient<T>(params, d_scores, weights, load_item(),
                                         load_walk().first_key, load_walk().keys, warp_row,
                                         first_column);
                }
            }
            // What is not finite reaches the rows that see it through p and ds, and others would
            // get it as 0 * NaN: it is taken out of the tiles before they are multiplied again.
            if (cut) {
                bool broken =
                    T::kWantsFirst &&
                    mask::holds_nonfinite<typename T::First, T::kMul, T::kThreads>(first_tile);
                if constexpr (T::kWantsSecond) {
                    broken |= mask::holds_nonfinite<typename T::Second, T::kMul, T::kThreads>(
                        second_tile);
                }
                if (ptx::block_sync_or(broken)) {
                    if constexpr (T::kWantsFirst) {
                        mask::zero_nonfinite<typename T::First, T::kMul, T::kThreads>(first_tile);
                    }
                    if constexpr (T::kWantsSecond) {
                        mask::separate_nonfinite<OfSecond>(d_second, second_tile, load_item(),
                                                           load_arrays(), warp_row, first_column);
                    }
                    ptx::block_sync();  // gone before any warp multiplies
                }
            }
            if constexpr (T::kWantsSecond) add_product<OfSecond>(d_second, weights, second_tile);
            if constexpr (T::kWantsFirst) add_product<OfFirst>(d_first, d_scores, first_tile);
        }
        if constexpr (T::kStages == 1) {
            ptx::block_sync();  // all are done with the tile
            fill_next(0);
        } else {
            stage ^= 1;
        }
        const Walk walk = load_walk();
        const bool wraps = tile + 1 == walk.end;
        tile = wraps ? walk.begin : tile + 1;
        head += wraps;
    }

    const work::WorkItem item = load_item();
    if constexpr (T::kOutput == kStatistics) {
        state.finish();
        float sink = -ptx::infinity();
        if (params.sinks != nullptr) {
            sink = params.sinks[item.head] / (T::kArrayMask ? 1.0f : params.scale);
        }
        store_statistics<T>(state, own_rows,
                            records_of(params, item.batch, item.head, item.row_first), warp_row,
                            item.rows, params.score_scale, sink);
    } else {
        const i64 head_of_all = static_cast<i64>(item.batch) * params.own_heads + item.head;
        const i64 row_zero = head_of_all * params.own_len + item.row_first;
        if constexpr (T::kWantsFirst) {
            store_gradient<T, OfFirst::kValueTiles>(d_first, params.d_first, row_zero, item.rows,
                                                    params.dim_qk, params.out_scale);
        }
        if constexpr (T::kWantsSecond) {
            store_gradient<T, OfSecond::kValueTiles>(d_second, params.d_second, row_zero, item.rows,
                                                     params.dim_v, 1.0f);
        }
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    if (params.broken != nullptr && *params.broken == 0) return;
#pragma unroll 1
    for (int block = static_cast<int>(ptx::block_index()); block < params.blocks;
         block += params.grid) {
        run_block<T>(params, block);
        ptx::copy_async_wait<0>();  // a block that saw nothing has not waited for its own rows
        ptx::block_sync();          // all are done with shared memory
    }
}

}  // namespace adaattn::sm80_attn_bwd
