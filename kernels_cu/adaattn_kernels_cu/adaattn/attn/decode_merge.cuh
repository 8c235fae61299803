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

// What weighs 2^(score - top), for the two columns of every tile that a lane holds.
template <class T>
struct Columns {
    float top[T::kTiles][2];      // alike in all lanes of a column; -inf before the first key
    float sum[T::kTiles][2];      // of kept weights, this lane's share of the keys
    float dropped[T::kTiles][2];  // of weights whose values were not read

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

    // log2 of the kept sum, no more than it is but for rounding; all lanes take part.
    ADAATTN_DEVICE float log2_sum(int tile, int j) const {
        const float total = over_keys(sum[tile][j], Sum{});
        return total > 0.0f ? top[tile][j] + __log2f(total) : -ptx::infinity();
    }

    // Scores to weights in place; they count as kept, or as dropped.
    ADAATTN_DEVICE void exponentiate(float (&s)[kChunkSteps][T::kTiles][4],
                                     const float (&largest)[T::kTiles][2], bool skip,
                                     float (&o)[T::kTiles][T::kOutTiles][4]) {
#pragma unroll
        for (int tile = 0; tile < T::kTiles; ++tile) {
            float factor[2];
            bool moved = false;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float next = fmaxf(top[tile][j], largest[tile][j]);
                factor[j] = next == top[tile][j] ? 1.0f : ptx::exp2_approx(top[tile][j] - next);
                moved = moved || next != top[tile][j];
                top[tile][j] = next;
                const float shift = next == -ptx::infinity() ? 0.0f : next;
                float added = 0.0f;
#pragma unroll
                for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
                    for (int i = j; i < 4; i += 2) {
                        s[step][tile][i] = ptx::exp2_approx(s[step][tile][i] - shift);
                        added += s[step][tile][i];
                    }
                }
                sum[tile][j] = sum[tile][j] * factor[j] + (skip ? 0.0f : added);
                dropped[tile][j] = dropped[tile][j] * factor[j] + (skip ? added : 0.0f);
            }
            if (ptx::warp_any(moved)) {
#pragma unroll
                for (int m = 0; m < T::kOutTiles; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[tile][m][i] *= factor[i % 2];
                }
            }
        }
    }
};

// Parts of one column, in base 2: tops, sums and dropped sums lie kStats floats apart.
constexpr int kStats = 3;

// Merges `count` parts of four channels of a column: parts at `values` and `stats`, `value_step` and
// `stat_step` floats apart, in this order.
struct Merged {
    float x[4];
    float top, sum, dropped;
};
ADAATTN_DEVICE Merged merge(const float* values, const float* stats, i64 value_step, i64 stat_step,
                            int count) {
    Merged all = {{0.0f, 0.0f, 0.0f, 0.0f}, -ptx::infinity(), 0.0f, 0.0f};
    for (int i = 0; i < count; ++i) all.top = fmaxf(all.top, stats[i * stat_step]);
    const float shift = all.top == -ptx::infinity() ? 0.0f : all.top;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        const float* own = stats + i * stat_step;
        const float factor = ptx::exp2_approx(own[0] - shift);
        const float4 part = *reinterpret_cast<const float4*>(values + i * value_step);
        all.x[0] = fmaf(part.x, factor, all.x[0]);
        all.x[1] = fmaf(part.y, factor, all.x[1]);
        all.x[2] = fmaf(part.z, factor, all.x[2]);
        all.x[3] = fmaf(part.w, factor, all.x[3]);
        all.sum = fmaf(own[1], factor, all.sum);
        all.dropped = fmaf(own[2], factor, all.dropped);
    }
    return all;
}

// Merges the warps of a block, and the blocks of a unit, and stores the rows.
template <class T>
ADAATTN_DEVICE void merge_and_store(const Params& p, const Place& at, int lane, int warp, int unit,
                                    int split, unsigned char* smem, const Columns<T>& mine,
                                    const float (&o)[T::kTiles][T::kOutTiles][4]) {
    float* values = reinterpret_cast<float*>(smem);
    float* stats = reinterpret_cast<float*>(smem + T::kStatsAt);
    const int key = lane / 4, place = lane % 4;
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int column = warp * T::kAllColumns + tile * kColumns + 2 * place + j;
            const float sum = over_keys(mine.sum[tile][j], Sum{});
            const float dropped = over_keys(mine.dropped[tile][j], Sum{});
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
    const int slots = at.rows * kQuads;
    const i64 part = static_cast<i64>(unit) * p.splits;
    float* all_stats = p.partials + static_cast<i64>(p.units) * p.splits * T::kAllColumns * T::kDim;
    const int thread = static_cast<int>(threadIdx.x);
    if (p.splits > 1) {
        for (int slot = thread; slot < slots; slot += T::kThreads) {
            const int column = slot / kQuads, channel = slot % kQuads * 4;
            const Merged x = merge(values + column * T::kDim + channel, stats + column * kStats,
                                   T::kAllColumns * T::kDim, T::kAllColumns * kStats, T::kWarps);
            const i64 at_column = (part + split) * T::kAllColumns + column;
            *reinterpret_cast<float4*>(p.partials + at_column * T::kDim + channel) =
                make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
            if (channel == 0) {
                all_stats[at_column * kStats] = x.top;
                all_stats[at_column * kStats + 1] = x.sum;
                all_stats[at_column * kStats + 2] = x.dropped;
            }
        }
        __threadfence();
        __syncthreads();  // (5)
        u32* arrived = reinterpret_cast<u32*>(smem);
        if (thread == 0) *arrived = atomicAdd(p.arrivals + unit, 1u);
        __syncthreads();  // (6)
        if (*arrived + 1 != static_cast<u32>(p.splits)) return;
        __threadfence();
        if (thread == 0) p.arrivals[unit] = 0u;
        values = p.partials + part * T::kAllColumns * T::kDim;
        stats = all_stats + part * T::kAllColumns * kStats;
    }
    const int parts = p.splits > 1 ? p.splits : T::kWarps;
    for (int slot = thread; slot < slots; slot += T::kThreads) {
        const int column = slot / kQuads, channel = slot % kQuads * 4;
        const Merged x = merge(values + column * T::kDim + channel, stats + column * kStats,
                               T::kAllColumns * T::kDim, T::kAllColumns * kStats, parts);
        const int row = at.first_row + column;
        int low, high;
        row_interval(p, at, row, low, high);
        const float sum = softmax::known_sum(x.sum, low < high);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const i64 place_out =
            row_offset(at, p.group, row, p.out_batch, p.out_head, p.out_row) + channel;
        uint2 packed;
        packed.x = quant::pack_pair<T::kInput>(x.x[0] * inverse, x.x[1] * inverse);
        packed.y = quant::pack_pair<T::kInput>(x.x[2] * inverse, x.x[3] * inverse);
        *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + place_out) = packed;
        if (channel == 0) {
            const i64 flat =
                (static_cast<i64>(at.batch * p.heads_kv + at.head_kv) * p.group + row % p.group) *
                    p.len_q +
                row / p.group;
            p.lse[flat] = softmax::natural_lse(x.top, 1.0f, sum);
            if (p.dropped)
                p.dropped[flat] = x.dropped > 0.0f ? x.dropped / (x.dropped + x.sum) : 0.0f;
        }
    }
}

}  // namespace adaattn::smxx_attn_decode
