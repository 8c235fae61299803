// smxx_probe.cuh -- softmax mass of every key over a few sampled rows, on any GPU, any format and mask.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A probe is a group of query rows of one head, some of which were sampled. Pass 0: a
//              block takes a stretch of keys, a thread a key at a time, and keeps maximum and sum of
//              every sampled row; block and threads join them. Pass 1: log-sum-exp of each row from
//              the stretches in their order, then mass_j = mean over the rows of 2^(s_j - lse), keys
//              in the row's near field left out. What Hopper plans on runs sm90_probe instead.
//              Source: this project, docs/design/0004.
// Numerics     Products and sums in f32, in a fixed order; 2^x within 2^-22.
// Tiles        128 threads; kRows rows at a time, their queries in shared memory.
// Shared mem   queries: f32, kRows x kDimMax; row figures: f32, 2 x kRows a warp.
// Registers    A score, a maximum and a sum a row.
// Barriers     Block barriers: queries are there before any thread reads them, and read before the
//              next rows replace them.
// Limits       dims up to kDimMax; a row that sees nothing has an lse of -inf and gives no mass.
// Ladder       none: it runs once a plan, on the host's behalf.
//
// Budget: registers<=255 spill_bytes=0 smem_bytes<=49152
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_probe {

constexpr int kDimMax = 256;

// The twin is PROBE of adaattn_cuda/kernels/smxx_probe.py.
struct Probe {
    i32 batch, head;                          // of the query
    i32 q_start, kv_start;                    // of the sequence
    i32 keys;                                 // that its rows can reach, from the sequence's first
    i32 key_stop, start_offset, stop_offset;  // the interval mask, as in WorkItem
};

// A sampled row, within its sequence, and its near field; row < 0: there is none.
struct Sample {
    i32 row, near_start, near_stop, padding;
};

struct Params {
    const void* query;
    const void* key;
    const unsigned char* allowed;  // as in sm80_params.cuh
    const void* bias;
    i64 query_batch, query_head, query_row;
    i64 key_batch, key_head, key_row;
    i64 allowed_batch, allowed_head, allowed_row, allowed_key;
    i64 bias_batch, bias_head, bias_row, bias_key;
    const Probe* probes;
    const Sample* samples;  // (probes, rows)
    float2* partial;        // (probes, splits, rows): maximum and sum, in log2 units
    float* lse;             // (probes, rows), in log2 units
    float* mass;            // (probes, key_stride)
    mask::BiasType bias_type;
    i32 dim, group_size, rows, splits, split_keys, key_stride;
    float scale;
};

static_assert(sizeof(Params) == 216, "mirrored by the host");

template <Format kInput_, int kPass_>
struct Traits {
    static constexpr Format kInput = kInput_;
    static constexpr int kPass = kPass_;
    static constexpr int kRows = 16;
    static constexpr int kThreads = 128;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

// Joins the maximum and sum of another part of a row's keys.
ADAATTN_DEVICE void join(float& top, float& sum, float other_top, float other_sum) {
    const float high = top > other_top ? top : other_top;
    if (high == -ptx::infinity()) return;
    sum = sum * ptx::exp2_approx(top - high) + other_sum * ptx::exp2_approx(other_top - high);
    top = high;
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float queries[T::kRows][kDimMax];
    __shared__ float tops[T::kWarps][T::kRows];
    __shared__ float sums[T::kWarps][T::kRows];
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpThreads, warp = thread / kWarpThreads;
    const int index = static_cast<int>(blockIdx.x) / params.splits;
    const int split = static_cast<int>(blockIdx.x) % params.splits;
    const Probe probe = params.probes[index];
    const int first = split * params.split_keys;
    const int stop = smaller(first + params.split_keys, probe.keys);
    work::WorkItem item = {};
    item.batch = probe.batch;
    item.head = probe.head;
    item.row_first = probe.q_start;
    item.key_stop = probe.key_stop;
    item.start_offset = probe.start_offset;
    item.stop_offset = probe.stop_offset;
    work::Source source = {};
    source.first_key = probe.kv_start;
    const mask::ArrayMask arrays(params, item, source);
    const i64 query_base = probe.batch * params.query_batch + probe.head * params.query_head +
                           probe.q_start * params.query_row;
    const i64 key_base = probe.batch * params.key_batch +
                         probe.head / params.group_size * params.key_head +
                         probe.kv_start * params.key_row;
    float* mass = params.mass + static_cast<i64>(index) * params.key_stride;
    int live = 0;  // sampled rows that there are
    for (int r = 0; r < params.rows; ++r) {
        live += params.samples[static_cast<i64>(index) * params.rows + r].row >= 0;
    }

    for (int chunk = 0; chunk < params.rows; chunk += T::kRows) {
        const int rows = smaller(T::kRows, params.rows - chunk);
        const Sample* samples = params.samples + static_cast<i64>(index) * params.rows + chunk;
        for (int i = thread; i < rows * params.dim; i += T::kThreads) {
            const int row = samples[i / params.dim].row;
            queries[i / params.dim][i % params.dim] =
                row < 0 ? 0.0f
                        : quant::load_element<T::kInput>(
                              params.query, query_base + row * params.query_row + i % params.dim);
        }
        if (T::kPass == 1 && thread < rows) {
            const float2* part =
                params.partial + static_cast<i64>(index) * params.splits * params.rows + chunk;
            float top = -ptx::infinity(), sum = 0.0f;
            for (int other = 0; other < params.splits; ++other) {
                const float2 found = part[other * params.rows + thread];
                join(top, sum, found.x, found.y);
            }
            // A NaN among the scores is one in the sum, and goes on.
            const float lse = sum == 0.0f ? -ptx::infinity() : top + ptx::log2_accurate(sum);
            tops[0][thread] = lse;
            if (split == 0)
                params.lse[static_cast<i64>(index) * params.rows + chunk + thread] = lse;
        }
        __syncthreads();  // the rows' queries are there
        float top[T::kRows], sum[T::kRows];
#pragma unroll
        for (int r = 0; r < T::kRows; ++r) {
            top[r] = -ptx::infinity();
            sum[r] = 0.0f;
        }
        for (int key = first + thread; key < stop; key += T::kThreads) {
            float score[T::kRows];
#pragma unroll
            for (int r = 0; r < T::kRows; ++r) score[r] = 0.0f;
            const i64 at = key_base + key * params.key_row;
#pragma unroll 4
            for (int d = 0; d < params.dim; ++d) {
                const float x = quant::load_element<T::kInput>(params.key, at + d);
#pragma unroll
                for (int r = 0; r < T::kRows; ++r)
                    score[r] = ptx::fma_rn(queries[r][d], x, score[r]);
            }
            float total = 0.0f;
#pragma unroll
            for (int r = 0; r < T::kRows; ++r) {
                if (r >= rows) continue;
                const Sample sample = samples[r];
                if (sample.row < 0 || !mask::visible(item, sample.row).holds(key)) continue;
                const float added = arrays.added(sample.row, key);
                if (added == -ptx::infinity()) continue;
                const float x = ptx::fma_rn(score[r], params.scale, added) * kLog2E;
                if (T::kPass == 0) {
                    join(top[r], sum[r], x, 1.0f);
                } else if (key < sample.near_start || key >= sample.near_stop) {
                    total +=
                        tops[0][r] == -ptx::infinity() ? 0.0f : ptx::exp2_approx(x - tops[0][r]);
                }
            }
            if (T::kPass == 1) {
                const float mean = total / static_cast<float>(larger(live, 1));
                mass[key] = chunk == 0 ? mean : mass[key] + mean;
            }
        }
        if (T::kPass == 0) {
#pragma unroll
            for (int r = 0; r < T::kRows; ++r) {
                for (int step = 16; step > 0; step /= 2) {
                    const float other_top = ptx::shuffle_xor(top[r], step);
                    const float other_sum = ptx::shuffle_xor(sum[r], step);
                    join(top[r], sum[r], other_top, other_sum);
                }
                if (lane == 0) {
                    tops[warp][r] = top[r];
                    sums[warp][r] = sum[r];
                }
            }
            __syncthreads();  // every warp's figures are there
            if (thread < rows) {
                float all = tops[0][thread], sum_all = sums[0][thread];
                for (int w = 1; w < T::kWarps; ++w) {
                    join(all, sum_all, tops[w][thread], sums[w][thread]);
                }
                const i64 place = static_cast<i64>(index) * params.splits + split;
                params.partial[place * params.rows + chunk + thread] = {all, sum_all};
            }
        }
        __syncthreads();  // and read, before the next rows
    }
    if (T::kPass == 1) {  // keys that nobody reaches
        const int end = smaller(first + params.split_keys, params.key_stride);
        for (int key = larger(stop, first) + thread; key < end; key += T::kThreads)
            mass[key] = 0.0f;
    }
}

}  // namespace adaattn::smxx_probe
