// smxx_pool.cuh -- weighted averages of the keys that are no landmarks, and their biases, on any GPU.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block makes one pool of one probe: with w_j = mass_j + base for the keys of its
//              stretch that are no landmarks, and 0 for the others,
//                k = sum w_j k_j / sum w_j, v likewise, n = how many they are;
//                predicted = sum over the sampled rows that see the pool as far of n 2^(q k - lse);
//                bias = ln n + ln(mass the rows gave them / predicted), clipped to ln n + [-3, 6].
//              Source: this project, docs/design/0004; the twin is adaattn_reference/farfield.py.
// Numerics     Sums in f32, in a fixed order; k, v rounded to the input type, and predicted from
//              what was rounded. A pool without keys is zeros with a bias of -inf.
// Tiles        128 threads, a dim each; a warp a sampled row.
// Shared mem   key: f32, kDimMax; partial sums: f32, 3 x kWarps.
// Registers    few.
// Barriers     Block barriers around every sum over the block.
// Limits       dims up to kDimMax.
// Ladder       none: it runs once a plan, on the host's behalf.
//
// Budget: registers<=128 spill_bytes=0 smem_bytes<=16384
#pragma once

#include "adaattn/plan/smxx_probe.cuh"

namespace adaattn::smxx_pool {

using smxx_probe::kDimMax;
using smxx_probe::Probe;
using smxx_probe::Sample;

constexpr float kBiasLeast = -3.0f, kBiasMost = 6.0f;  // in nats, relative to ln n
constexpr float kPredictedMost = 20.0f;                // of one row, in nats
constexpr float kTiny = 1e-20f;

struct Params {
    const void* query;
    const void* key;
    const void* value;
    i64 query_batch, query_head, query_row;
    i64 key_batch, key_head, key_row;
    i64 value_batch, value_head, value_row;
    const Probe* probes;
    const Sample* samples;       // (probes, rows)
    const float* lse;            // (probes, rows), in log2 units
    const float* mass;           // (probes, key_stride)
    const unsigned char* taken;  // (probes, key_stride): 1 for landmarks
    const float* base;           // (probes,): what every pooled key weighs besides
    const i32* first;            // (probes,): first pool row
    const i32* pools;            // (probes,)
    void* pool_key;              // (rows, dim_qk), in the input type
    void* pool_value;            // (rows, dim_v)
    float* bias;                 // (rows,)
    i32 dim_qk, dim_v, group_size, rows, key_stride, pool_keys, pools_most, causal, fitted;
    float scale;
};

static_assert(sizeof(Params) == 224, "mirrored by the host");

template <Format kInput_>
struct Traits {
    static constexpr Format kInput = kInput_;
    static constexpr int kThreads = 128;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

template <Format kInput>
ADAATTN_DEVICE float store(void* base, i64 index, float x) {
    if constexpr (kInput == Format::f32) {
        static_cast<float*>(base)[index] = x;
        return x;
    } else {
        const u16 bits = quant::narrow<kInput>(x);
        static_cast<u16*>(base)[index] = bits;
        return quant::widen<kInput>(bits);
    }
}

// Sum over the block, the same in every thread; `space` holds a float a warp.
template <class T>
ADAATTN_DEVICE float block_sum(float x, float* space) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int step = 16; step > 0; step /= 2) x += ptx::shuffle_xor(x, step);
    if (thread % kWarpThreads == 0) space[thread / kWarpThreads] = x;
    __syncthreads();  // every warp's part is there
    float sum = 0.0f;
    for (int w = 0; w < T::kWarps; ++w) sum += space[w];
    __syncthreads();  // and read, before the next sum
    return sum;
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float pooled[kDimMax];
    __shared__ float space[T::kWarps];
    const int thread = static_cast<int>(threadIdx.x);
    const int index = static_cast<int>(blockIdx.x) / params.pools_most;
    const int pool = static_cast<int>(blockIdx.x) % params.pools_most;
    if (pool >= params.pools[index]) return;
    const Probe probe = params.probes[index];
    const int first = pool * params.pool_keys;
    const int stop = smaller(first + params.pool_keys, probe.keys);
    const i64 table = static_cast<i64>(index) * params.key_stride;
    const auto weight = [&](int key) {
        return params.taken[table + key] ? 0.0f : params.mass[table + key] + params.base[index];
    };
    float own_weight = 0.0f, own_mass = 0.0f, own_count = 0.0f;
    for (int key = first + thread; key < stop; key += T::kThreads) {
        own_weight += weight(key);
        if (!params.taken[table + key]) {
            own_mass += params.mass[table + key];
            own_count += 1.0f;
        }
    }
    const float total = block_sum<T>(own_weight, space);
    const float mass = block_sum<T>(own_mass, space);
    const float count = block_sum<T>(own_count, space);
    const i64 row = params.first[index] + pool;
    const int head_kv = probe.head / params.group_size;
    const float share = 1.0f / (total > 1e-30f ? total : 1e-30f);
    const auto average = [&](const void* from, i64 base, i64 stride, int column) {
        float sum = 0.0f;
        for (int key = first; key < stop; ++key) {
            const float x = weight(key);
            if (x != 0.0f) {
                sum = ptx::fma_rn(
                    x, quant::load_element<T::kInput>(from, base + key * stride + column), sum);
            }
        }
        return sum * share;
    };
    const i64 key_base = probe.batch * params.key_batch + head_kv * params.key_head +
                         probe.kv_start * params.key_row;
    const i64 value_base = probe.batch * params.value_batch + head_kv * params.value_head +
                           probe.kv_start * params.value_row;
    for (int d = thread; d < params.dim_qk; d += T::kThreads) {
        const float x = average(params.key, key_base, params.key_row, d);
        pooled[d] = store<T::kInput>(params.pool_key, row * params.dim_qk + d, x);
    }
    for (int d = thread; d < params.dim_v; d += T::kThreads) {
        const float x = average(params.value, value_base, params.value_row, d);
        store<T::kInput>(params.pool_value, row * params.dim_v + d, x);
    }
    __syncthreads();  // the pooled key is there
    float predicted = 0.0f, seen = 0.0f;
    for (int r = thread / kWarpThreads; r < params.rows; r += T::kWarps) {
        const Sample sample = params.samples[static_cast<i64>(index) * params.rows + r];
        const float lse = params.lse[static_cast<i64>(index) * params.rows + r];
        const bool before = pool < sample.near_start / params.pool_keys;
        const bool behind = !params.causal && pool >= ceil_div(sample.near_stop, params.pool_keys);
        if (sample.row < 0 || lse == -ptx::infinity() || !(before || behind)) continue;
        const i64 query = probe.batch * params.query_batch + probe.head * params.query_head +
                          (probe.q_start + sample.row) * params.query_row;
        float dot = 0.0f;
        for (int d = thread % kWarpThreads; d < params.dim_qk; d += kWarpThreads) {
            dot = ptx::fma_rn(quant::load_element<T::kInput>(params.query, query + d), pooled[d],
                              dot);
        }
        for (int step = 16; step > 0; step /= 2) dot += ptx::shuffle_xor(dot, step);
        if (thread % kWarpThreads == 0) {
            const float x = dot * params.scale * kLog2E + ptx::log2_accurate(count) - lse;
            const float most = kPredictedMost * kLog2E;
            predicted += ptx::exp2_approx(x < most ? x : most);
            seen += 1.0f;
        }
    }
    predicted = block_sum<T>(predicted, space);
    seen = block_sum<T>(seen, space);
    if (thread != 0) return;
    float live = 0.0f;
    for (int r = 0; r < params.rows; ++r) {
        live += params.samples[static_cast<i64>(index) * params.rows + r].row >= 0 ? 1.0f : 0.0f;
    }
    float bias = -ptx::infinity();
    if (count > 0.0f) {
        const float given = mass * live;
        const float ratio = ptx::log2_accurate(given > kTiny ? given : kTiny) -
                            ptx::log2_accurate(predicted > kTiny ? predicted : kTiny);
        float fitted = params.fitted && seen > 0.0f ? kLn2 * ratio : 0.0f;
        fitted = fitted < kBiasLeast ? kBiasLeast : (fitted > kBiasMost ? kBiasMost : fitted);
        bias = kLn2 * ptx::log2_accurate(count) + fitted;
    }
    params.bias[row] = bias;
}

}  // namespace adaattn::smxx_pool
