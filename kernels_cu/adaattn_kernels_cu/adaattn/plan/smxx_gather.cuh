// smxx_gather.cuh -- copies rows of keys and values side by side, on any GPU.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A warp copies one row of keys and its row of values; a place without a row is zeros.
// Numerics     Bits are copied.
// Tiles        256 threads, a warp a row.
// Shared mem   none.
// Registers    few.
// Barriers     none.
// Limits       Elements of 2 or 4 bytes.
// Ladder       none.
//
// Budget: registers<=64 spill_bytes=0 smem_bytes<=1024
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::smxx_gather {

// A row of the arrays; row < 0: none. The twin is PLACE of adaattn_cuda/kernels/smxx_gather.py.
struct Place {
    i32 batch, head, row, padding;
};

struct Params {
    const void* key;
    const void* value;
    i64 key_batch, key_head, key_row;
    i64 value_batch, value_head, value_row;
    const Place* places;
    void* to_key;    // (places, dim_qk)
    void* to_value;  // (places, dim_v)
    i32 dim_qk, dim_v, places_count;
};

static_assert(sizeof(Params) == 104, "mirrored by the host");

template <int kElementBytes_>
struct Traits {
    static constexpr int kElementBytes = kElementBytes_;
    static constexpr int kThreads = 256;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kSmemBytes = 0;
};

template <int kBytes>
struct Element;
template <>
struct Element<2> {
    using Type = u16;
};
template <>
struct Element<4> {
    using Type = u32;
};

template <class T>
ADAATTN_DEVICE void copy(const void* from, i64 first, void* to, i64 place, int dim, bool exists) {
    using Bits = typename Element<T::kElementBytes>::Type;
    const auto* source = static_cast<const Bits*>(from) + first;
    auto* target = static_cast<Bits*>(to) + place * dim;
    for (int d = static_cast<int>(threadIdx.x) % kWarpThreads; d < dim; d += kWarpThreads) {
        target[d] = exists ? source[d] : Bits(0);
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    const int index =
        static_cast<int>(blockIdx.x) * T::kWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
    if (index >= params.places_count) return;
    const Place from = params.places[index];
    copy<T>(params.key,
            from.batch * params.key_batch + from.head * params.key_head + from.row * params.key_row,
            params.to_key, index, params.dim_qk, from.row >= 0);
    copy<T>(params.value,
            from.batch * params.value_batch + from.head * params.value_head +
                from.row * params.value_row,
            params.to_value, index, params.dim_v, from.row >= 0);
}

}  // namespace adaattn::smxx_gather
