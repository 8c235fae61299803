// tma.cuh -- the bulk tensor copy engine. SPDX-License-Identifier: Apache-2.0
//
// PTX ISA, "cp.async.bulk" and "cp.async.bulk.tensor". One thread starts a copy; its bytes complete
// on an mbarrier.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// Opaque 128-byte descriptor made on the host by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// L2 eviction policies, as encoded by createpolicy.fractional with fraction 1.
constexpr u64 kEvictFirst = 0x12F0000000000000ull;
constexpr u64 kEvictLast = 0x14F0000000000000ull;

ADAATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies one box of a (dim, len, head, batch) tensor; what lies outside the tensor arrives as
// zeros.
ADAATTN_DEVICE void tma_load(u32 destination, const TensorMap* map, u32 barrier, u64 policy,
                             i32 dim, i32 row, i32 head, i32 batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(destination),
        "l"(map), "r"(barrier), "l"(policy), "r"(dim), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// Copies `bytes` (a multiple of 16) of contiguous global memory.
ADAATTN_DEVICE void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(destination),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

}  // namespace adaattn::ptx
