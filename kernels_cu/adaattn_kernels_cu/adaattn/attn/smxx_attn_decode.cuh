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
//                3. with kSkip: if no column's weights sum to more than skip_share of a lower bound
//                   of its final sum, the values are not read, and what they weigh is added up;
//                   values that are read arrive while the next keys are looked at;
//                4. O^T += V^T P^T; narrow pages into sums of their own, then scaled.
//              Keys, values and the scales of narrow pages pass through a ring of the warp's own:
//              with kBulk one more warp tells the copy engine of all rings, else a warp's lanes copy
//              (cp.async). With kBulk a launch may begin while the one before it ends. Warps merge in shared memory; the last block of
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
// Barriers     With kBulk mbarriers: a slot is full, a slot is empty, values are there, floors are
//              there. Of the block: (1) Q is there; (2) the floors are there (kSkip; those that look
//              at keys); (3) all warps are done with Q before O overwrites it; (4) O is there;
//              (5) partials are written before the arrival is counted, (6) by one thread for all;
//              (7, 8) merging splits.
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
    static constexpr int kThreads = 32 * (kWarps + kBulk);  // one more copies
    static constexpr int kWords = kDim / 8;                 // of a lane's part of 8 queries
    static constexpr int kOutTiles = kDim / 16;             // of 16 channels
    static constexpr int kAllColumns = kTiles * kColumns;
    static constexpr int kQueryBytes = 2 * kTiles * kWords * 32 * 4;
    static constexpr int kBarrierBytes = round_up((kWarps * (2 * kStages + 1) + 1) * 8, 128);
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
    // Narrow values of a chunk are there at once.
    static_assert(kStages >= (kSkip ? 1 : kDim / 64) && kWarps < 32, "slots of a ring");
    static_assert(is_narrow(kInput) && kDim % 64 == 0, "16-bit inputs of dim 64, 128, 256");
};

// Chunks of 64 keys: those of the unit, and of a warp.
struct Span {
    const i32* table;
    int first, last;  // the unit's: first .. last - 1
    int begin, end;   // the warp's: begin, begin + kWarps, ...; before end
    int probe;        // looked at before them for its scores alone; < 0: none

    ADAATTN_DEVICE i32 entry_of(const Params& p, int number) const {
        return number < end ? table[number / p.page_chunks] : 0;
    }
};

// A lower bound of the log-sum-exp of a warp's columns, from the scores of a chunk.
template <class T>
ADAATTN_DEVICE void note_floor(const Lane& me, int warp,
                               const float (&s)[kChunkSteps][T::kTiles][4],
                               const float (&largest)[T::kTiles][2], float* factors) {
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

// Scores and weighted values of a warp's chunks.
template <class T>
ADAATTN_DEVICE void look(const Params& p, const Place& at, const Lane& me, int warp,
                         const Span& span, const u32* words, float* factors, Stream<T>& stream,
                         Columns<T>& mine, float (&o)[T::kTiles][T::kOutTiles][4]) {
    float s[kChunkSteps][T::kTiles][4];
    float largest[T::kTiles][2], floor[T::kTiles][2];
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int m = 0; m < T::kOutTiles; ++m) {
            o[tile][m][0] = o[tile][m][1] = o[tile][m][2] = o[tile][m][3] = 0.0f;
        }
        floor[tile][0] = floor[tile][1] = -ptx::infinity();
    }
    bool probing = T::kSkip && span.probe >= 0, met = !T::kSkip;
    int number = span.begin;
    i32 entry = probing ? span.table[span.probe / p.page_chunks] : span.entry_of(p, number);
    // Entries of the table are read two chunks ahead, units of pages one.
    i32 entry_after = span.entry_of(p, probing ? number : number + T::kWarps);
    Units units = units_of(p, entry);
    Held<T> held;
    bool waiting = false;  // for the values of `held`
    while (true) {
        if constexpr (T::kSkip) {
            if (!probing && !met) {
                stream.meet();  // (2)
                met = true;
                if (span.first < span.last) {
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
        }
        const bool done = !probing && number >= span.end;
        Chunk chunk;
        Units unit;
        float factor[T::kTiles][2], added[T::kTiles][2];
        bool skip = false, moved = false;
        if (!done) {
            chunk = chunk_of(p, entry, probing ? span.probe : number);
            unit = units;
            if (!probing) number += T::kWarps;
            entry = entry_after;
            units = units_of(p, entry);
            entry_after = span.entry_of(p, number + T::kWarps);
            chunk_scores<T>(p, at, me, chunk, unit.key, words, factors, s, stream);
            column_maxima<T>(s, largest);
            if (T::kSkip && probing) {
                note_floor<T>(me, warp, s, largest, factors);
                stream.begin(p, span.begin, span.end);
                probing = false;
                continue;
            }
            moved = mine.weigh(s, largest, factor, added);
            skip = T::kSkip && chunk.number != span.first && chunk.number != span.last - 1 &&
                   mine.light(added, floor, p.skip_share, me.place, at.rows);
        }
        if constexpr (T::kSkip) {
            // Values arrive while the next keys are looked at, and are added before O moves on.
            if (waiting && (done || !skip || moved)) {
                add_values<T>(p, at, me, held, o, stream);
                waiting = false;
            }
        }
        if (done) break;
        mine.count(added, skip);
        if (moved) scale_columns<T>(o, factor);
        if (skip) continue;
        held.hold(chunk, unit.value, s);
        if constexpr (T::kSkip) {
            stream.fetch_values(p, chunk);
            waiting = true;
        } else {
            add_values<T>(p, at, me, held, o, stream);
        }
    }
    if constexpr (!T::kBulk) ptx::copy_async_wait<0>();
}

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
    const bool copies = T::kBulk && warp == T::kWarps;
    const Rings<T> rings = {ptx::shared_base()};
    const int unit = static_cast<int>(blockIdx.x) / p.splits;
    const int split = static_cast<int>(blockIdx.x) % p.splits;
    Place at = place_of<T>(p, unit);
    if constexpr (T::kBulk) {
        if (copies) init_barriers<T>(rings, me.lane);
        ptx::await_earlier_kernels();
        ptx::let_next_kernel_start();
    }
    if (!copies) load_queries<T>(p, at, warp, me.lane, words, factors);
    read_lengths(p, at);
    const int first = at.low / kChunkKeys;
    const int last = at.high > at.low ? ceil_div(at.high, kChunkKeys) : first;
    const int share = (last - first) / p.splits, more = (last - first) % p.splits;
    const int begin = first + split * share + smaller(split, more);
    const int end = begin + share + (split < more ? 1 : 0);
    const i32* table = p.table + at.batch * p.table_batch + at.head_kv * p.table_head;
    // Warps 0 and 1 look at the unit's first and last chunk before their own.
    const int looker = copies ? me.lane : warp;
    const bool probes = T::kSkip && looker < 2 && first < last;
    const int probe = looker == 0 ? first : last - 1;
    Feeder<T> feeder;
    Stream<T> stream;
    if constexpr (T::kBulk) {
        if (copies) {
            feeder.rings = rings;
            feeder.table = table;
            feeder.lane = me.lane;
            feeder.begin(p, begin, end, probes ? probe : -1);
#pragma unroll 1
            for (int i = 0; i < T::kStages; ++i) feeder.step(p);
        }
        stream.rings = rings;
        stream.warp = warp;
        stream.parity = stream.value_parity = 0u;
    } else {
        stream.base = ptx::shared_base() + T::kRingAt + warp * T::kSlots * T::kSlotBytes;
        stream.start = 0;
        stream.table = table;
    }
    stream.lane = me.lane;
    stream.turn = 0;
    if (!copies) stream.begin(p, probes ? probe : begin + warp, probes ? probe + 1 : end);
    __syncthreads();  // (1)

    Columns<T> mine;
    float o[T::kTiles][T::kOutTiles][4];
    if (copies) {
        feeder.run(p);
    } else {
        const Span span = {table, first, last, begin + warp, end, probes ? probe : -1};
        look<T>(p, at, me, warp, span, words, factors, stream, mine, o);
    }
    __syncthreads();  // (3)
    merge_and_store<T>(p, at, me.lane, warp, unit, split, smem, mine, o);
}

}  // namespace adaattn::smxx_attn_decode
