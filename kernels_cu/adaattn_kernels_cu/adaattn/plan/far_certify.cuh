// far_certify.cuh -- compares what was returned with exact attention of freshly drawn rows: an upper bound per head.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per head. 1. |returned - exact| of every drawn row. 2. The rms of all returned rows, from the sums of squares
//              that the forward kernel left. 3. upper = (order statistic + what the exact rows may themselves err by) / rms, the least k for which
//              P(Binomial(rows, share) <= k - 1) reaches the confidence being the host's. 4. failed = upper above the budget.
//              5. The block that finishes last ranks the heads that failed: far_list lists them to be computed exactly.
//              Source: this project, docs/math/10-order-statistic.md, theorem 10.
// Numerics     f32, rounded up by 2^-16; NaN counts as infinite.
// Tiles        512 threads: eight lanes a row, then a thread a row.
// Shared mem   errors: f32, 512 rows; norms likewise.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=8192
// Limits       at most 512 drawn rows a head; dim_v a multiple of 8 up to 256; rows start on 16 bytes.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_items.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_certify {

struct Verdict {
    float upper;     // certified, relative to the rms returned row
    float estimate;  // relative Frobenius error of the drawn rows
    float rms;       // of the returned rows
    float oracle;    // what the exact rows may err by, relative
    i32 rounds;      // outputs of this head that were tested
    i32 nonfinite;
    float first_upper;  // of the first output tested
    i32 proved;         // 1: by theorem (far_prove); nothing was drawn
};

struct Params {
    far::Sizes sizes;
    far::Rows out;
    const i32* drawn_rows;   // (batch, heads_q, drawn_stride)
    const float* exact;      // (batch, heads_q, drawn_stride, dim_v)
    const float* squares;    // (batch, heads_q, square_stride): of 16 returned rows each
    const u32* norms;        // (2, batch, heads_kv): bits of the largest |v| and |k|
    const u32* query_norms;  // (batch, heads_q): of the drawn rows
    i32* failed;             // (batch, heads_q)
    Verdict* verdicts;
    float budget;
    float sum_factor;    // error of an exact row's sums over the largest |v|
    float score_factor;  // of its scores over |q| |k|
    i32 drawn;
    i32 drawn_stride;  // rows of a head in drawn_rows
    i32 drawn_first;   // the rows before it judged
    i32 square_stride;
    i32 unproved;       // 1: only heads that failed are tested, none of which was before
    i32 order;          // the order-th smallest error counts, from 1
    i32 second;         // 1: only heads that failed are tested, again
    i32 section_heads;  // key heads whose keys and values L2 holds together
    far::List again;    // of the heads that failed; without places where none is to be made
    i32* finished;      // blocks done; 0 before and after
};

template <Format kFormatT, int kThreadsT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kRowsMax = 512;
    static constexpr int kSmemBytes = 0;
    static_assert(kThreads == kRowsMax, "a thread a row");
};

template <class T>
ADAATTN_DEVICE float block_sum(float x, float* space) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    __syncthreads();
    if (threadIdx.x % kWarpThreads == 0) space[threadIdx.x / kWarpThreads] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < T::kWarps; ++w) sum += space[w];
    return sum;
}

// The order-th smallest of the numbers, none of them negative, that threads of the block hold: the least bit pattern that so many
// do not exceed, bit by bit. The whole block calls.
ADAATTN_DEVICE float order_statistic(float own, bool counts, int order) {
    const u32 bits = static_cast<u32>(__float_as_int(own));
    u32 found = 0x7fffffffu;
    for (u32 bit = 1u << 30; bit != 0; bit >>= 1) {
        const u32 tried = found & ~bit;  // all lower bits still set: the largest such number
        if (__syncthreads_count(counts && bits <= tried) >= order) found = tried;
    }
    return __int_as_float(static_cast<int>(found));
}

// The verdict of one head.
template <class T>
ADAATTN_DEVICE void test(const Params& params, int head) {
    __shared__ float errors[T::kRowsMax];
    __shared__ float norms[T::kRowsMax];
    __shared__ float space[T::kWarps];
    const far::Sizes& sizes = params.sizes;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    // Sums of squares of all returned rows, sixteen rows each.
    float squares = 0.0f;
    const float* own_squares = params.squares + static_cast<i64>(head) * params.square_stride;
    for (int i = thread; i < ceil_div(sizes.len_q, 16); i += T::kThreads) squares += own_squares[i];
    squares = block_sum<T>(squares, space);
    // The sums are of rows before they were rounded to 16 bits: 2^-8 at most.
    const float rms = sqrtf(squares / static_cast<float>(sizes.len_q)) * (1.0f - 3.90625e-3f);

    // Eight lanes a row, so that a warp has the loads of many rows in flight.
#pragma unroll 4
    for (int first = 4 * warp; first < params.drawn; first += 4 * T::kWarps) {
        const int row = smaller(first + lane / 8, params.drawn - 1);
        const i64 index = static_cast<i64>(head) * params.drawn_stride + params.drawn_first + row;
        const u16* returned =
            params.out.at(head / sizes.heads_q, head % sizes.heads_q, params.drawn_rows[index]);
        const float* exact = params.exact + index * sizes.dim_v;
        float error = 0.0f;
        float norm = 0.0f;
        for (int dim = 4 * (lane % 8); dim < sizes.dim_v; dim += 32) {
            const float4 row_truth = *reinterpret_cast<const float4*>(exact + dim);
            const uint2 words = *reinterpret_cast<const uint2*>(returned + dim);
            const float truth[4] = {row_truth.x, row_truth.y, row_truth.z, row_truth.w};
            const u32 pairs[2] = {words.x, words.y};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u16 bits = static_cast<u16>(pairs[i / 2] >> (16 * (i % 2)) & 0xffffu);
                const float away = quant::widen<T::kFormat>(bits) - truth[i];
                error = fmaf(away, away, error);
                norm = fmaf(truth[i], truth[i], norm);
            }
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) {
            error += __shfl_xor_sync(kFullWarp, error, step);
            norm += __shfl_xor_sync(kFullWarp, norm, step);
        }
        if (lane % 8 == 0 && first + lane / 8 < params.drawn) {
            errors[row] = error == error ? error : ptx::infinity();
            norms[row] = norm;
        }
    }
    __syncthreads();
    const float found = order_statistic(thread < params.drawn ? errors[thread] : ptx::infinity(),
                                        thread < params.drawn, params.order);
    const float all_errors = block_sum<T>(thread < params.drawn ? errors[thread] : 0.0f, space);
    const float all_norms = block_sum<T>(thread < params.drawn ? norms[thread] : 0.0f, space);
    if (thread != 0) return;
    const int key_head = head / sizes.heads_q * sizes.heads_kv +
                         head % sizes.heads_q / (sizes.heads_q / sizes.heads_kv);
    const int key_heads = sizes.batch * sizes.heads_kv;
    const float value_norm = __int_as_float(static_cast<int>(params.norms[key_head]));
    const float key_norm = __int_as_float(static_cast<int>(params.norms[key_heads + key_head]));
    const float query_norm = __int_as_float(static_cast<int>(params.query_norms[head]));
    // A score error of d moves a row by at most tanh(d / 2) times the values' diameter (theorem 1).
    const float oracle =
        (params.sum_factor + fminf(params.score_factor * query_norm * key_norm, 2.0f)) * value_norm;
    const float reached = (sqrtf(found) + oracle) * (1.0f + 3.0517578e-5f);
    float upper = reached == 0.0f ? 0.0f : reached / rms;
    const bool nonfinite = !(squares < ptx::infinity());
    if (nonfinite || !(upper == upper)) upper = ptx::infinity();
    Verdict& verdict = params.verdicts[head];
    if (!params.second) {
        verdict.rounds = 1;
        verdict.first_upper = upper;
    } else {
        verdict.rounds = 2;
    }
    verdict.upper = upper;
    verdict.estimate = all_errors == 0.0f ? 0.0f : sqrtf(all_errors / all_norms);
    verdict.rms = rms;
    verdict.oracle = oracle / rms;
    verdict.nonfinite = nonfinite;
    verdict.proved = 0;
    params.failed[head] = !(upper <= params.budget);
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ int space[T::kWarps];
    __shared__ bool last;
    const int head = static_cast<int>(blockIdx.x);
    if ((params.second || params.unproved) && params.failed[head] == 0) return;
    test<T>(params, head);
    if (params.again.places == nullptr) return;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(params.finished, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const i32* failed = params.failed;
    far::rank_heads<T::kThreads>(
        params.sizes, params.again, params.section_heads,
        [=](int other) { return __ldcg(failed + other) != 0; }, space);
    if (threadIdx.x == 0) *params.finished = 0;
}

}  // namespace adaattn::far_certify
