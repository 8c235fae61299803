// smxx_attn_bwd_rows.cuh -- what a backward pass must know of every query row before it begins.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    delta = sum of out x grad_out - grad_lse, and the lse in the units in which the
//              kernels behind it exponentiate. `rows`: one RowRecord a row (sm80_attn_bwd).
//              A row of which only its sink is left sees nothing: its record is that of a blind
//              row, but for the gradient of the lse, which goes to the sink.
//              `lse_log2` and `deltas`, where they are given: the lse in base 2, +inf for rows that
//              see nothing, which makes every weight 0, and delta (sm90_attn_bwd_f16); `broken` is
//              then set where an lse is too large for that kernel.
// Numerics     f32 sums of exact products of 16-bit numbers; f32 products are rounded.
// Tiles        Eight lanes to a row, 32 rows to a block of 256 threads.
// Shared mem   None.
// Registers    Few.
// Barriers     None.
// Limits       out and grad_out have stride 1 along their last axis; kVectorised: rows begin on 16
//              bytes and hold whole 16-byte chunks.
// Ladder       One pass over two arrays: bandwidth-bound.
//
// Budget: registers<=64 spill_bytes=0 smem_bytes<=0
#pragma once

#include "adaattn/attn/sm80_bwd_params.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_attn_bwd_rows {

using sm80_attn_bwd::RowRecord;

// |lse| in base 2 from which its rounding is no longer small beside that of 16-bit weights.
constexpr float kFarLse16 = 8192.0f;

struct Params {
    const void* out;        // (batch, heads, len, dim_v)
    const void* grad_out;   // the same
    const float* lse;       // (batch, heads, len), contiguous
    const float* grad_lse;  // the same, or null
    const float* sinks;     // (heads), or null: the lse counts them
    RowRecord* rows;        // (batch, heads, len)
    float* lse_log2;        // (batch, heads, len) both, or null both
    float* deltas;
    u32* broken;  // with `lse_log2`
    i64 out_batch, out_head, out_row;
    i64 grad_batch, grad_head, grad_row;
    i32 batch, heads, len, dim_v;
    float unit;  // what turns a natural lse into the units of a RowRecord
    i32 reserved;
};

template <Format kInputT, bool kVectorisedT>
struct Traits {
    static constexpr Format kInput = kInputT;
    static constexpr bool kVectorised = kVectorisedT;
    static constexpr int kThreads = 256, kSmemBytes = 0;
    static constexpr int kLanes = 8, kRows = kThreads / kLanes;
};

// Sum of x[i] y[i] over this lane's share of two rows.
template <class T>
ADAATTN_DEVICE float partial_product(const void* x, const void* y, int dim, int lane) {
    float sum = 0.0f;
    if constexpr (T::kVectorised) {
        constexpr int kChunk = 16 / storage_bytes(T::kInput);
        for (int column = lane * kChunk; column < dim; column += T::kLanes * kChunk) {
            u32 a[4], b[4];
            ptx::load_global_128(a,
                                 static_cast<const char*>(x) + column * storage_bytes(T::kInput));
            ptx::load_global_128(b,
                                 static_cast<const char*>(y) + column * storage_bytes(T::kInput));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (is_narrow(T::kInput)) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const u16 low = static_cast<u16>(a[i] >> 16 * half);
                        const u16 other = static_cast<u16>(b[i] >> 16 * half);
                        sum = ptx::fma_rn(quant::widen<T::kInput>(low),
                                          quant::widen<T::kInput>(other), sum);
                    }
                } else {
                    sum = ptx::fma_rn(ptx::bits_float(a[i]), ptx::bits_float(b[i]), sum);
                }
            }
        }
    } else {
        for (int column = lane; column < dim; column += T::kLanes) {
            sum = ptx::fma_rn(quant::load_element<T::kInput>(x, column),
                              quant::load_element<T::kInput>(y, column), sum);
        }
    }
    return sum;
}

// Whether this lane's share of a row holds anything but zeros.
template <class T>
ADAATTN_DEVICE bool holds_something(const void* x, int dim, int lane) {
    bool found = false;
    for (int column = lane; column < dim; column += T::kLanes) {
        found |= !(quant::load_element<T::kInput>(x, column) == 0.0f);
    }
    return found;
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const i64 total = static_cast<i64>(params.batch) * params.heads * params.len;
    const i64 place =
        static_cast<i64>(ptx::block_index()) * T::kRows + ptx::thread_index() / T::kLanes;
    const bool exists = place < total;
    const i64 head = exists ? place / params.len : 0;  // of all heads of all batch entries
    const i64 row = exists ? place - head * params.len : 0;
    const int lane = ptx::thread_index() % T::kLanes;

    float sum = 0.0f, something = 1.0f;
    if (exists) {
        const i64 batch = head / params.heads, h = head % params.heads;
        const auto at = [](const void* base, i64 element) -> const void* {
            return static_cast<const char*>(base) + element * storage_bytes(T::kInput);
        };
        sum = partial_product<T>(
            at(params.out, batch * params.out_batch + h * params.out_head + row * params.out_row),
            at(params.grad_out,
               batch * params.grad_batch + h * params.grad_head + row * params.grad_row),
            params.dim_v, lane);
        // Keys next to a huge sink may leave the lse as it is, but not the output at 0.
        if (params.sinks != nullptr && params.lse[place] == params.sinks[h]) {
            something =
                holds_something<T>(at(params.out, batch * params.out_batch + h * params.out_head +
                                                      row * params.out_row),
                                   params.dim_v, lane);
        }
    }
#pragma unroll
    for (int step = 1; step < T::kLanes; step *= 2) {
        sum += ptx::shuffle_xor(sum, step);
        something += ptx::shuffle_xor(something, step);
    }
    if (!exists || lane != 0) return;

    const float lse = params.lse[place];
    const bool blind = lse == -ptx::infinity() || something == 0.0f;
    float delta = blind ? 0.0f : sum;
    if (params.grad_lse != nullptr && lse != -ptx::infinity()) delta -= params.grad_lse[place];
    params.rows[place] = {lse * params.unit, blind ? 0.0f : 1.0f, delta, 0.0f};
    if (params.lse_log2 != nullptr) {
        const float base_two = lse * kLog2E;
        params.lse_log2[place] = blind ? ptx::infinity() : base_two;
        params.deltas[place] = delta;
        if (!blind && !(base_two < kFarLse16 && base_two > -kFarLse16)) *params.broken = 1;
    }
}

}  // namespace adaattn::smxx_attn_bwd_rows
