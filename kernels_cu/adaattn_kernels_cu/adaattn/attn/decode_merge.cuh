// decode_merge.cuh -- softmax state of packed columns, and merging it over warps and over blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/attn/decode_queries.cuh"
#include "adaattn/softmax/lse.cuh"

namespace adaattn::smxx_attn_decode {

struct Larger {
    ADAATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    ADAATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};

// Over the lanes that hold the same columns: those of other keys.
template <class Join>
ADAATTN_DEVICE float over_keys(float x, Join join) {
    x = join(x, ptx::shuffle_xor(x, 4));
    x = join(x, ptx::shuffle_xor(x, 8));
    return join(x, ptx::shuffle_xor(x, 16));
}

// What a part weighs whose reference is `own`; no part weighs anything where all are -inf.
ADAATTN_DEVICE float part_factor(float own, float top) {
    return ptx::exp2_approx(own - (top == -ptx::infinity() ? 0.0f : top));
}

// What weighs 2^(score - top), for the two columns of every tile that a lane holds.
template <class T>
struct Columns {
    float top[T::kTiles][2];  // alike in all lanes of a column; -inf before the first key
    // Of kept weights, and of those whose values were not read; of this lane's share of the keys, with
    // kSkip of all.
    float sum[T::kTiles][2], dropped[T::kTiles][2];

    ADAATTN_DEVICE Columns() {
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                top[tile][j] = -ptx::infinity();
                sum[tile][j] = dropped[tile][j] = 0.0f;
            }
        }
    }

    // Scores to weights in place; references move with `largest`, and sums with them: O is to be
    // multiplied by `factor` if the result says so, alike in all lanes. `added`: of these weights.
    ADAATTN_DEVICE bool weigh(float (&s)[kChunkSteps][T::kTiles][4],
                              const float (&largest)[T::kTiles][2], float (&factor)[T::kTiles][2],
                              float (&added)[T::kTiles][2]) {
        bool moved = false;
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float next = fmaxf(top[tile][j], largest[tile][j]);
                factor[tile][j] =
                    next == top[tile][j] ? 1.0f : ptx::exp2_approx(top[tile][j] - next);
                moved = moved || next != top[tile][j];
                top[tile][j] = next;
                const float shift = next == -ptx::infinity() ? 0.0f : next;
                float x = 0.0f;
#pragma unroll
                for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
                    for (int i = j; i < 4; i += 2) {
                        s[step][tile][i] = ptx::exp2_approx(s[step][tile][i] - shift);
                        x += s[step][tile][i];
                    }
                }
                added[tile][j] = T::kSkip ? over_keys(x, Sum{}) : x;
                sum[tile][j] *= factor[tile][j];
                dropped[tile][j] *= factor[tile][j];
            }
        }
        return ptx::warp_any(moved);
    }

    // Whether the weights `added` are no more than `share` of what is kept, or of 2^floor, in every
    // column of a row; alike in all lanes.
    ADAATTN_DEVICE bool light(const float (&added)[T::kTiles][2],
                              const float (&floor)[T::kTiles][2], float share, int place,
                              int rows) const {
        bool small = true;
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float least = fmaxf(sum[tile][j], part_factor(floor[tile][j], top[tile][j]));
                const bool real = tile * kColumns + 2 * place + j < rows;
                small = small && (!real || added[tile][j] <= share * least);
            }
        }
        return !ptx::warp_any(!small);
    }

    ADAATTN_DEVICE void count(const float (&added)[T::kTiles][2], bool skip) {
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                sum[tile][j] += skip ? 0.0f : added[tile][j];
                dropped[tile][j] += skip ? added[tile][j] : 0.0f;
            }
        }
    }
};

template <class T>
ADAATTN_DEVICE void scale_columns(float (&o)[T::kTiles][T::kOutTiles][4],
                                  const float (&factor)[T::kTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int m = 0; m < T::kOutTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) o[tile][m][i] *= factor[tile][i % 2];
        }
    }
}

// Parts of one column, in base 2: tops, sums and dropped sums lie kStats floats apart.
constexpr int kStats = 3;
constexpr int kSplitsMost = 256;
constexpr int kEarly = 8;  // values of so many splits are read ahead

// Shared bytes of `merge_splits`: weights, columns, and four channels for every thread.
__host__ __device__ constexpr int split_scratch(int columns, int threads) {
    return (kSplitsMost * columns + round_up(columns * kStats, 4) + 4 * threads) * 4;
}
__host__ __device__ constexpr int larger_of(int a, int b) { return a > b ? a : b; }

// Four channels of a column, merged.
struct Merged {
    float x[4];
    float top, sum, dropped;

    ADAATTN_DEVICE void add(const float4& part, float factor) {
        x[0] = fmaf(part.x, factor, x[0]);
        x[1] = fmaf(part.y, factor, x[1]);
        x[2] = fmaf(part.z, factor, x[2]);
        x[3] = fmaf(part.w, factor, x[3]);
    }
};

// Merges the warps' parts, which lie in shared memory, in their order.
template <class T>
ADAATTN_DEVICE Merged merge_warps(const float* values, const float* stats, int column,
                                  int channel) {
    Merged all = {{0.0f, 0.0f, 0.0f, 0.0f}, -ptx::infinity(), 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < T::kWarps; ++i) {
        all.top = fmaxf(all.top, stats[(i * T::kAllColumns + column) * kStats]);
    }
#pragma unroll
    for (int i = 0; i < T::kWarps; ++i) {
        const int at = i * T::kAllColumns + column;
        const float factor = part_factor(stats[at * kStats], all.top);
        all.add(*reinterpret_cast<const float4*>(values + at * T::kDim + channel), factor);
        all.sum = fmaf(stats[at * kStats + 1], factor, all.sum);
        all.dropped = fmaf(stats[at * kStats + 2], factor, all.dropped);
    }
    return all;
}

template <class T>
ADAATTN_DEVICE void store_row(const Params& p, const Place& at, int column, int channel,
                              const Merged& x) {
    const int row = at.first_row + column;
    int low, high;
    row_interval(p, at, row, low, high);
    const float sum = softmax::known_sum(x.sum, low < high);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const i64 place = row_offset(at, p.group, row, p.out_batch, p.out_head, p.out_row) + channel;
    uint2 packed;
    packed.x = quant::pack_pair<T::kInput>(x.x[0] * inverse, x.x[1] * inverse);
    packed.y = quant::pack_pair<T::kInput>(x.x[2] * inverse, x.x[3] * inverse);
    *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + place) = packed;
    if (channel == 0) {
        const i64 head = (static_cast<i64>(at.batch) * p.heads_kv + at.head_kv) * p.group;
        const i64 flat = (head + row % p.group) * p.len_q + row / p.group;
        p.lse[flat] = softmax::natural_lse(x.top, 1.0f, sum);
        if (p.dropped) {
            p.dropped[flat] = x.dropped > 0.0f ? x.dropped / (x.dropped + x.sum) : 0.0f;
        }
    }
}

// Merges the splits of a unit, in their order, and stores its rows. Partial results come from other
// multiprocessors: they are read past L1. Loads do not wait for each other.
template <class T>
ADAATTN_DEVICE void merge_splits(const Params& p, const Place& at, int unit, float* scratch) {
    constexpr int kQuads = T::kDim / 4;
    const int thread = static_cast<int>(threadIdx.x);
    const i64 first = static_cast<i64>(unit) * p.splits * T::kAllColumns;
    const float* values = p.partials + first * T::kDim;
    const float* stats = p.partials +
                         static_cast<i64>(p.units) * p.splits * T::kAllColumns * T::kDim +
                         first * kStats;
    float* factors = scratch;                                       // [split][column]
    float* columns = factors + p.splits * T::kAllColumns;           // [column]: top, sum, dropped
    float* parts = columns + round_up(T::kAllColumns * kStats, 4);  // [group][slot]: 4 channels
    // Values are on their way while it is found out what they weigh.
    const int slots = at.rows * kQuads;
    const int groups = larger(T::kThreads / slots, 1);
    const int group = thread / slots;
    const float* mine = values + thread % slots / kQuads * T::kDim + thread % slots % kQuads * 4;
    float4 early[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
        const int split = group + i * groups;
        if (group < groups && split < p.splits) {
            early[i] = __ldcg(reinterpret_cast<const float4*>(mine + static_cast<i64>(split) *
                                                                         T::kAllColumns * T::kDim));
        }
    }
    for (int column = thread / 32; column < at.rows; column += T::kThreads / 32) {
        const int lane = thread % 32;
        float top = -ptx::infinity(), sum = 0.0f, dropped = 0.0f;
        for (int split = lane; split < p.splits; split += 32) {
            const float* part = stats + (split * T::kAllColumns + column) * kStats;
            const float own = __ldcg(part), own_sum = __ldcg(part + 1);
            const float own_dropped = __ldcg(part + 2), next = fmaxf(top, own);
            factors[split * T::kAllColumns + column] = own;
            const float old = part_factor(top, next), factor = part_factor(own, next);
            sum = fmaf(own_sum, factor, sum * old);
            dropped = fmaf(own_dropped, factor, dropped * old);
            top = next;
        }
        const float all = over_keys(softmax::quad_max(top), Larger{});
        const float factor = part_factor(top, all);
        sum = over_keys(softmax::quad_sum(sum * factor), Sum{});
        dropped = over_keys(softmax::quad_sum(dropped * factor), Sum{});
        for (int split = lane; split < p.splits; split += 32) {
            float& own = factors[split * T::kAllColumns + column];
            own = part_factor(own, all);
        }
        if (lane == 0) {
            columns[column * kStats] = all;
            columns[column * kStats + 1] = sum;
            columns[column * kStats + 2] = dropped;
        }
    }
    __syncthreads();  // (7)
    for (int place = thread; place < larger(slots, groups * slots); place += T::kThreads) {
        const int slot = place % slots;
        const int column = slot / kQuads, channel = slot % kQuads * 4;
        Merged x = {{0.0f, 0.0f, 0.0f, 0.0f},
                    columns[column * kStats],
                    columns[column * kStats + 1],
                    columns[column * kStats + 2]};
        int split = place / slots;
        if (place == thread) {
#pragma unroll
            for (int i = 0; i < kEarly; ++i, split += groups) {
                if (split < p.splits) x.add(early[i], factors[split * T::kAllColumns + column]);
            }
        }
#pragma unroll 8
        for (; split < p.splits; split += groups) {
            const int row = split * T::kAllColumns + column;
            x.add(__ldcg(reinterpret_cast<const float4*>(values + static_cast<i64>(row) * T::kDim +
                                                         channel)),
                  factors[row]);
        }
        if (groups == 1) {
            store_row<T>(p, at, column, channel, x);
        } else {
            *reinterpret_cast<float4*>(parts + place * 4) =
                make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
        }
    }
    if (groups == 1) return;
    __syncthreads();  // (8)
    if (thread >= slots) return;
    const int column = thread / kQuads;
    Merged x = {{0.0f, 0.0f, 0.0f, 0.0f},
                columns[column * kStats],
                columns[column * kStats + 1],
                columns[column * kStats + 2]};
    for (int i = 0; i < groups; ++i) {
        x.add(*reinterpret_cast<const float4*>(parts + (i * slots + thread) * 4), 1.0f);
    }
    store_row<T>(p, at, column, thread % kQuads * 4, x);
}

// Merges the warps of a block, and the blocks of a unit, and stores the rows.
template <class T>
ADAATTN_DEVICE void merge_and_store(const Params& p, const Place& at, int lane, int warp, int unit,
                                    int split, unsigned char* smem, const Columns<T>& mine,
                                    const float (&o)[T::kTiles][T::kOutTiles][4]) {
    float* values = reinterpret_cast<float*>(smem + T::kValuesAt);
    float* stats = reinterpret_cast<float*>(smem + T::kStatsAt);
    const int key = lane / 4, place = lane % 4;
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
        if (warp >= T::kWarps) break;  // the one that copies
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = warp * T::kAllColumns + tile * kColumns + 2 * place + j;
            const float own = mine.sum[tile][j], dropped = mine.dropped[tile][j];
            const float sum = T::kSkip ? own : over_keys(own, Sum{});
            if (key == 0) {
                stats[column * kStats] = mine.top[tile][j];
                stats[column * kStats + 1] = sum;
                stats[column * kStats + 2] = dropped;
            }
#pragma unroll
            for (int m = 0; m < T::kOutTiles; ++m) {
                // Row key of the tile is channel 2 (m % 4) of the lane's eight, row key + 8 the next.
                const int channel = 64 * (m / 4) + 8 * key + 2 * (m % 4);
                *reinterpret_cast<float2*>(values + column * T::kDim + channel) =
                    make_float2(o[tile][m][j], o[tile][m][2 + j]);
            }
        }
    }
    __syncthreads();  // (4)
    constexpr int kQuads = T::kDim / 4;
    const int thread = static_cast<int>(threadIdx.x);
    const i64 part = (static_cast<i64>(unit) * p.splits + split) * T::kAllColumns;
    float* all_stats = p.partials + static_cast<i64>(p.units) * p.splits * T::kAllColumns * T::kDim;
    for (int slot = thread; slot < at.rows * kQuads; slot += T::kThreads) {
        const int column = slot / kQuads, channel = slot % kQuads * 4;
        const Merged x = merge_warps<T>(values, stats, column, channel);
        if (p.splits == 1) {
            store_row<T>(p, at, column, channel, x);
            continue;
        }
        *reinterpret_cast<float4*>(p.partials + (part + column) * T::kDim + channel) =
            make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
        if (channel == 0) {
            float* own = all_stats + (part + column) * kStats;
            own[0] = x.top;
            own[1] = x.sum;
            own[2] = x.dropped;
        }
    }
    if (p.splits == 1) return;
    __syncthreads();  // (5)
    bool last = false;
    if (thread == 0) {
        // What the block wrote, before it is counted; what others wrote, after.
        __threadfence();
        last = atomicAdd(p.arrivals + unit, 1u) + 1 == static_cast<u32>(p.splits);
        if (last) p.arrivals[unit] = 0u;
        __threadfence();
    }
    if (!ptx::block_sync_or(last)) return;  // (6)
    merge_splits<T>(p, at, unit, values);
}

}  // namespace adaattn::smxx_attn_decode
