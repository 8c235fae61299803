// smxx_exact_rows.cuh -- how far returned rows are from exact attention of the same rows, in f64.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block takes a drawn row: 1. scores of kThreads keys, a thread each; a softcap, then
//              masks; 2. softmax over them, the maximum and the sums running on from the keys
//              before; 3. sums of weighted values, a thread a column or two; 4. at the end a sink,
//              if there is one, and |out - exact| and |exact|.
//              Source: this project, docs/math/10-sampling.md (fresh rows).
// Numerics     Everything in f64 from the inputs as they are; exp and tanh of the library, 2 ulp.
// Tiles        128 threads.
// Shared mem   query: f32, kDimMax; scores and sums: f64, kThreads each.
// Registers    two sums a thread.
// Barriers     Block barriers: scores are there before any thread looks for their maximum, weights
//              before any sums, and both read before the next keys.
// Limits       dims up to kDimMax; a key that is hidden, or weighs nothing, is not multiplied.
// Ladder       none: a few hundred rows a head.
//
// Budget: registers<=128 spill_bytes=0 smem_bytes<=16384
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_exact_rows {

constexpr int kDimMax = 256;

// A drawn row. The twin is ROW of adaattn_cuda/kernels/smxx_exact_rows.py.
struct Row {
    i32 batch, head, row;                     // row within its sequence
    i32 q_start, kv_start;                    // of the sequence
    i32 key_stop, start_offset, stop_offset;  // the interval mask, as in WorkItem
};

struct Figures {
    double error, norm;  // |out - exact|, |exact|
};

struct Params {
    const void* query;
    const void* key;
    const void* value;
    const void* out;
    const unsigned char* allowed;  // as in sm80_params.cuh
    const void* bias;
    const float* sinks;  // one a query head, or null
    i64 query_batch, query_head, query_row;
    i64 key_batch, key_head, key_row;
    i64 value_batch, value_head, value_row;
    i64 out_batch, out_head, out_row;
    i64 allowed_batch, allowed_head, allowed_row, allowed_key;
    i64 bias_batch, bias_head, bias_row, bias_key;
    const Row* rows;
    Figures* figures;
    double scale, softcap;  // softcap 0: none
    mask::BiasType bias_type;
    i32 dim_qk, dim_v, group_size;
};

static_assert(sizeof(Params) == 264, "mirrored by the host");

template <Format kInput_>
struct Traits {
    static constexpr Format kInput = kInput_;
    static constexpr int kThreads = 128;
    static constexpr int kColumns = kDimMax / kThreads;
    static constexpr int kSmemBytes = 0;
};

template <class T>
ADAATTN_DEVICE double block_sum(double x, double* space) {
    const int thread = static_cast<int>(threadIdx.x);
    space[thread] = x;
    __syncthreads();  // every thread's part is there
    double sum = 0.0;
#pragma unroll 4
    for (int i = 0; i < T::kThreads; ++i) sum += space[i];
    __syncthreads();  // and read
    return sum;
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float query[kDimMax];
    __shared__ double scores[T::kThreads];
    __shared__ double space[T::kThreads];
    const int thread = static_cast<int>(threadIdx.x);
    const double hidden = -static_cast<double>(ptx::infinity());
    const Row row = params.rows[blockIdx.x];
    work::WorkItem item = {};
    item.batch = row.batch;
    item.head = row.head;
    item.row_first = row.q_start;
    item.key_stop = row.key_stop;
    item.start_offset = row.start_offset;
    item.stop_offset = row.stop_offset;
    work::Source source = {};
    source.first_key = row.kv_start;
    const mask::ArrayMask arrays(params, item, source);
    const mask::Interval seen = mask::visible(item, row.row);
    const i64 query_at = row.batch * params.query_batch + row.head * params.query_head +
                         (row.q_start + row.row) * params.query_row;
    const int head_kv = row.head / params.group_size;
    const i64 key_at =
        row.batch * params.key_batch + head_kv * params.key_head + row.kv_start * params.key_row;
    const i64 value_at = row.batch * params.value_batch + head_kv * params.value_head +
                         row.kv_start * params.value_row;
    for (int d = thread; d < params.dim_qk; d += T::kThreads) {
        query[d] = quant::load_element<T::kInput>(params.query, query_at + d);
    }
    __syncthreads();  // the query is there
    double sums[T::kColumns];
    for (int c = 0; c < T::kColumns; ++c) sums[c] = 0.0;
    double top = hidden, total = 0.0;
    for (int first = larger(seen.start, 0); first < seen.stop; first += T::kThreads) {
        const int key = first + thread;
        double score = hidden;
        if (key < seen.stop) {
            const float added = arrays.added(row.row, key);
            if (added != -ptx::infinity()) {
                const i64 at = key_at + key * params.key_row;
                double dot = 0.0;
#pragma unroll 4
                for (int d = 0; d < params.dim_qk; ++d) {
                    dot += static_cast<double>(query[d]) *
                           static_cast<double>(quant::load_element<T::kInput>(params.key, at + d));
                }
                score = dot * params.scale;
                if (params.softcap > 0.0) score = params.softcap * tanh(score / params.softcap);
                score += static_cast<double>(added);
            }
        }
        scores[thread] = score;
        __syncthreads();  // all scores are there
        double high = top;
#pragma unroll 4
        for (int i = 0; i < T::kThreads; ++i) high = scores[i] > high ? scores[i] : high;
        const double fading = top == hidden ? 0.0 : exp(top - high);
        __syncthreads();  // and read, before weights take their place
        const double weight = score == hidden ? 0.0 : exp(score - high);
        scores[thread] = weight;
        const double added_weight = block_sum<T>(weight, space);  // its barriers publish weights
        total = total * fading + added_weight;
        top = high;
        const int keys = smaller(seen.stop - first, T::kThreads);
        for (int c = 0; c < T::kColumns; ++c) {
            const int column = c * T::kThreads + thread;
            if (column >= params.dim_v) continue;
            double sum = sums[c] * fading;
#pragma unroll 4
            for (int i = 0; i < keys; ++i) {
                if (scores[i] == 0.0) continue;
                const i64 at = value_at + (first + i) * params.value_row + column;
                sum += scores[i] *
                       static_cast<double>(quant::load_element<T::kInput>(params.value, at));
            }
            sums[c] = sum;
        }
        __syncthreads();  // weights are read, before the next scores
    }
    double share = 1.0;
    if (params.sinks != nullptr) {
        const double sink = static_cast<double>(params.sinks[row.head]);
        const double high = sink > top ? sink : top;
        if (high != hidden) {
            share = exp(top - high);
            total = total * share + exp(sink - high);
        }
    }
    const i64 out_at = row.batch * params.out_batch + row.head * params.out_head +
                       (row.q_start + row.row) * params.out_row;
    double error = 0.0, norm = 0.0;
    for (int c = 0; c < T::kColumns; ++c) {
        const int column = c * T::kThreads + thread;
        if (column >= params.dim_v) continue;
        const double exact = total == 0.0 ? 0.0 : sums[c] * share / total;
        const double away =
            static_cast<double>(quant::load_element<T::kInput>(params.out, out_at + column)) -
            exact;
        error += away * away;
        norm += exact * exact;
    }
    error = block_sum<T>(error, space);
    norm = block_sum<T>(norm, space);
    if (thread == 0) params.figures[blockIdx.x] = {sqrt(error), sqrt(norm)};
}

}  // namespace adaattn::smxx_exact_rows
