// smxx_attn_bwd_sinks.cuh -- gradients of the sinks, from the records of a pass's query rows.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A sink of logit z is a key of value 0. Its weight w in a row is made from the row's
//              record as the keys' are, or 1 where they have none; the gradient of its score is
//              -w delta. The sum over the rows of its head is the gradient, taken in a fixed order.
// Numerics     f32; the exponential is approximate (2 ulp).
// Tiles        A block to a head, kThreads rows at a time.
// Shared mem   Partial sums, kThreads x 16 bytes.
// Registers    Few.
// Barriers     The block's, for the partial sums.
// Limits       A sink of -inf is none: its gradient is 0.
// Ladder       One pass over 16 bytes a row.
//
// Budget: registers<=64 spill_bytes=0 smem_bytes<=4096
#pragma once

#include "adaattn/attn/sm80_bwd_params.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::smxx_attn_bwd_sinks {

using sm80_attn_bwd::RowRecord;

struct Params {
    const float* sinks;     // (heads)
    const RowRecord* rows;  // (batch, heads, len), as the pass left them
    float* d_sinks;         // (heads)
    i32 batch, heads, len;
    float unit;  // what turns a natural score into the units of a RowRecord
    float score_scale;
    i32 reserved;
};

template <int kThreadsT>
struct Traits {
    static constexpr int kThreads = kThreadsT, kSmemBytes = 16 * kThreadsT;
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const int head = static_cast<int>(ptx::block_index()), thread = ptx::thread_index();
    const float sink = params.sinks[head], own = ptx::mul_rn(sink, params.unit);
    float sum = 0.0f;
    for (int b = 0; b < params.batch; ++b) {
        const i64 first = (static_cast<i64>(b) * params.heads + head) * params.len;
        for (int row = thread; row < params.len; row += T::kThreads) {
            const RowRecord record = params.rows[first + row];
            float weight = 1.0f;
            if (record.inverse != 0.0f) {
                const float above = ptx::mul_rn(own - record.top, params.score_scale);
                weight = ptx::exp2_approx(above) * record.inverse;
            }
            // A weight of 0 takes no part, whatever delta is.
            if (weight > 0.0f) sum = ptx::fma_rn(-weight, record.delta, sum);
        }
    }
    const u32 shared = ptx::shared_base();
    const u32 mine[4] = {ptx::float_bits(sum), 0u, 0u, 0u};
    ptx::store_shared_128(shared + 16 * thread, mine);
    ptx::block_sync();
    if (thread != 0) return;
    float total = 0.0f;
    for (int i = 0; i < T::kThreads; ++i) {
        total += ptx::bits_float(ptx::load_shared_32(shared + 16 * i));
    }
    params.d_sinks[head] = sink == -ptx::infinity() ? 0.0f : total;
}

}  // namespace adaattn::smxx_attn_bwd_sinks
