// smxx_attn_decode.cuh -- attention of few rows over a cache on pages, on any GPU from Ampere on.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    The rows of all query heads that share a key/value head are packed into columns of
//              mma.m16n8k16: keys are its M, so a cache is read once whatever the group. Blocks
//              split the keys of a unit (sequence, head, tile of columns); each warp takes 64 keys
//              at a time:
//                1. S^T = K Q^T; narrow pages: the page's reach is folded into Q, its centre is
//                   one more key;
//                2. online softmax in base 2, a reference per column;
//                3. with kSkip: if no column's scores come within skip_log2 of a lower bound of its
//                   final log-sum-exp, the values are not read, and what they weigh is added up;
//                   values that are read arrive while the next keys are looked at;
//                4. O^T += V^T P^T; narrow pages into sums of their own, then scaled.
//              Keys, values and the scales of narrow pages pass through a ring of the warp's own, by
//              the copy engine (kBulk) or cp.async. Warps merge in shared memory; the last block of
//              a unit to arrive merges the splits (attn/decode_merge.cuh), in their order: the same
//              bits every time.
//              The lower bound: log-sum-exp of the unit's first and last 64 keys, which are always
//              kept, or of what the warp has kept. Source: docs/math/11-pages.md, theorem 11.
//              Split keys and packed heads: FlashDecoding (Dao, 2023).
// Numerics     Wide pages: operands in the input's format. Narrow pages: codes are exact in f16; Q
//              is scaled per row by a power of two, rounded to f16, and again after the reach.
//              (r1) Q twice (narrow only); (r2) products and sums of K Q^T, f32; (r3) 2^x, relative
//              2^-22; (r4) P to the input's format, or f16; the sum keeps unrounded P; (r5) products
//              and sums of V P, f32; (r6) out to the input's format.
// Tiles        16 keys x 8 columns x kDim, kTiles column tiles; kWarps warps of 64 keys.
// Shared mem   | name   | type | shape                          | live                    |
//              | ring   | byte | kWarps x kSlots x kSlotBytes   | until the last key      |
//              | Q      | 16 b | 2 orders x kTiles x kDim x 8   | until the last key      |
//              | f      | f32  | kTiles x 8 x (scale, 2 floors) | until the last key      |
//              | O      | f32  | kWarps x kTiles x 8 x kDim     | merging                 |
//              | stats  | f32  | kWarps x kTiles x 8 x 3        | merging                 |
//              O and stats alias Q, f and the ring. A slot is 4 KiB and a page's scales; with kSkip
//              the last kDim / 32 of a warp's are for the values of one chunk.
// Registers    O takes kTiles kDim / 4 of them, a narrow page's sums 16 kTiles.
// Barriers     With kBulk an mbarrier a slot, and one for a chunk's values. Of the block: (1) Q is
//              there; (2) the floors are there (kSkip); (3) all warps are done with Q before O
//              overwrites it; (4) O is there; (5) partials are written before the arrival is
//              counted; (6) the count is there, (7) and known; (8, 9) merging splits.
// Limits       The host has checked: kDim in 64, 128, 256 for keys and values; 16-byte rows;
//              page_len a multiple of 64; the table's entries. A NaN or Inf in a value that only
//              some columns of a tile see makes all columns of that tile NaN.
// Ladder       docs/kernels/smxx_attn_decode.md
//
// Budget: registers<=255 spill_bytes<=16 smem_bytes<=232448
#pragma once

#include "adaattn/attn/decode_chunk.cuh"

namespace adaattn::smxx_attn_decode {

template <Format kInput_, Code kKeyCode_, Code kValueCode_, int kDim_, int kTiles_, int kWarps_,
          int kStages_, bool kSkip_, bool kBulk_>
struct Traits {
    static constexpr Format kInput = kInput_;
    static constexpr Code kKeyCode = kKeyCode_, kValueCode = kValueCode_;
    static constexpr int kDim = kDim_, kTiles = kTiles_;
    static constexpr bool kSkip = kSkip_, kBulk = kBulk_;
    static constexpr int kWarps = kWarps_, kStages = kStages_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kWords = kDim / 8;      // of a lane's part of 8 queries
    static constexpr int kOutTiles = kDim / 16;  // of 16 channels
    static constexpr int kAllColumns = kTiles * kColumns;
    static constexpr int kQueryBytes = 2 * kTiles * kWords * 32 * 4;
    static constexpr int kBarrierBytes = round_up(kWarps * (kStages + 1) * 8, 128);
    static constexpr int kQueriesAt = kBarrierBytes;
    static constexpr int kFactorAt = kQueriesAt + kQueryBytes;  // then the floors of two warps
    static constexpr int kRingAt = round_up(kFactorAt + 3 * kAllColumns * 4, 128);
    static constexpr int kSlotBytes = kSliceBytes + 4 * kDim;
    static constexpr int kSlots = kStages + (kSkip ? kDim / 32 : 0);  // of a warp
    static constexpr int kReadBytes = kRingAt + kWarps * kSlots * kSlotBytes;
    static constexpr int kValuesAt = kBarrierBytes;
    static constexpr int kStatsAt = kValuesAt + kWarps * kAllColumns * kDim * 4;
    static constexpr int kWarpsBytes = kStatsAt + kWarps * kAllColumns * 3 * 4;
    static constexpr int kSplitsBytes = kValuesAt + split_scratch(kAllColumns, kThreads);
    static constexpr int kMergeBytes = larger_of(kWarpsBytes, kSplitsBytes);
    static constexpr int kSmemBytes = larger_of(kMergeBytes, kReadBytes);
    // Narrow values of a chunk are there at once; with the copy engine one slot more is full when
    // the next slice is waited for.
    static_assert(kStages >= (kSkip ? 1 : kDim / 64) + (kBulk ? 1 : 0), "slots of a ring");
    static_assert(is_narrow(kInput) && kDim % 64 == 0, "16-bit inputs of dim 64, 128, 256");
};

template <class T>
ADAATTN_DEVICE void run(const Params& p) {
    unsigned char* smem = ptx::shared_bytes();
    u32* words = reinterpret_cast<u32*>(smem + T::kQueriesAt);
    float* factors = reinterpret_cast<float*>(smem + T::kFactorAt);
    const int warp = ptx::broadcast(static_cast<int>(threadIdx.x) / 32, 0);
    Lane me;
    me.lane = static_cast<int>(threadIdx.x) % 32;
    me.key = me.lane / 4;
    me.place = me.lane % 4;
    const int unit = static_cast<int>(blockIdx.x) / p.splits;
    const int split = static_cast<int>(blockIdx.x) % p.splits;
    const Place at = place_of<T>(p, unit);
    const int first = at.low / kChunkKeys;
    const int last = at.high > at.low ? ceil_div(at.high, kChunkKeys) : first;
    const i64 count = last - first;
    const int begin = first + static_cast<int>(count * split / p.splits);
    const int end = first + static_cast<int>(count * (split + 1) / p.splits);
    Stream<T> stream;
    stream.base = ptx::shared_base() + T::kRingAt + warp * T::kSlots * T::kSlotBytes;
    stream.barriers = ptx::shared_base() + warp * (T::kStages + 1) * 8;
    stream.lane = me.lane;
    stream.table = p.table + at.batch * p.table_batch + at.head_kv * p.table_head;
    stream.turn = stream.start = 0;
    stream.parity = stream.value_parity = 0u;
    if constexpr (T::kBulk) {
        if (me.lane == 0) {
            for (int i = 0; i <= T::kStages; ++i) ptx::mbarrier_init(stream.barriers + 8 * i, 1);
            ptx::mbarrier_init_fence();
        }
        __syncwarp();
    }
    // The first keys are under way before anything else is read.
    const int probe = warp == 0 ? first : last - 1;
    const bool probes = T::kSkip && warp < 2 && first < last;
    if (probes) {
        stream.begin(p, probe, probe + 1);
    } else {
        stream.begin(p, begin + warp, end);
    }
    if (warp < T::kTiles) load_queries<T>(p, at, warp, me.lane, words, factors);
    __syncthreads();  // (1)

    float s[kChunkSteps][T::kTiles][4];
    float largest[T::kTiles][2], floor[T::kTiles][2];
    bool real[T::kTiles][2];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            real[tile][j] = tile * kColumns + 2 * me.place + j < at.rows;
            floor[tile][j] = -ptx::infinity();
        }
    }
    if constexpr (T::kSkip) {
        // Warps 0 and 1: log-sum-exp of the first and the last chunk, which are never skipped.
        if (probes) {
            const i32 entry = stream.entry_of(p, probe);
            const Chunk chunk = chunk_of(p, entry, probe);
            const float unit = units_of(p, entry).key;
            chunk_scores<T>(p, at, me, chunk, unit, words, factors, s, stream);
            stream.settle();
            stream.begin(p, begin + warp, end);
            column_maxima<T>(s, largest);
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float top = largest[tile][j];
                    const float shift = top == -ptx::infinity() ? 0.0f : top;
                    float sum = 0.0f;
#pragma unroll
                    for (int step = 0; step < kChunkSteps; ++step) {
                        sum += ptx::exp2_approx(s[step][tile][j] - shift) +
                               ptx::exp2_approx(s[step][tile][2 + j] - shift);
                    }
                    sum = over_keys(sum, Sum{});
                    if (me.key == 0) {
                        factors[(1 + warp) * T::kAllColumns + tile * kColumns + 2 * me.place + j] =
                            shift + ptx::log2_accurate(sum);
                    }
                }
            }
        }
        __syncthreads();  // (2)
        if (first < last) {
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    // The larger of the two is a lower bound too, and a chunk may be both.
                    const int column = tile * kColumns + 2 * me.place + j;
                    floor[tile][j] = fmaxf(factors[T::kAllColumns + column],
                                           factors[2 * T::kAllColumns + column]);
                }
            }
        }
    }

    Columns<T> mine;
    float o[T::kTiles][T::kOutTiles][4];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int m = 0; m < T::kOutTiles; ++m) {
            o[tile][m][0] = o[tile][m][1] = o[tile][m][2] = o[tile][m][3] = 0.0f;
        }
    }
    int number = begin + warp;
    // Entries of the table are read two chunks ahead, units of pages one.
    i32 entry = stream.entry_of(p, number), entry_after = stream.entry_of(p, number + T::kWarps);
    Units units = units_of(p, entry);
    Held<T> held;
    bool waiting = false;  // for the values of `held`
    while (number < end) {
        const Chunk chunk = chunk_of(p, entry, number);
        const Units unit = units;
        number += T::kWarps;
        entry = entry_after;
        units = units_of(p, entry);
        entry_after = stream.entry_of(p, number + T::kWarps);
        chunk_scores<T>(p, at, me, chunk, unit.key, words, factors, s, stream);
        column_maxima<T>(s, largest);
        bool skip = false;
        if constexpr (T::kSkip) {
            bool below = chunk.number != first && chunk.number != last - 1;
#pragma unroll
            for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float kept = mine.log2_sum(tile, j);
                    const float limit = fmaxf(kept, floor[tile][j]) + p.skip_log2;
                    below = below && (!real[tile][j] || largest[tile][j] <= limit);
                }
            }
            skip = !ptx::warp_any(!below);
        }
        if constexpr (T::kSkip) {
            // Values arrive while the next keys are looked at, and are added before O moves on.
            if (waiting && (!skip || mine.moves(largest))) {
                add_values<T>(p, at, me, held, o, stream);
                waiting = false;
            }
        }
        mine.exponentiate(s, largest, skip, o);
        if (!skip) {
            held.hold(chunk, unit.value, s);
            if constexpr (T::kSkip) {
                stream.fetch_values(p, chunk);
                waiting = true;
            } else {
                add_values<T>(p, at, me, held, o, stream);
            }
        }
    }
    if constexpr (T::kSkip) {
        if (waiting) add_values<T>(p, at, me, held, o, stream);
    }
    if constexpr (!T::kBulk) ptx::copy_async_wait<0>();
    __syncthreads();  // (3)
    merge_and_store<T>(p, at, me.lane, warp, unit, split, smem, mine, o);
}

}  // namespace adaattn::smxx_attn_decode
