// wgmma.cuh -- ordering and shared-memory descriptors of the warpgroup matrix unit.
// SPDX-License-Identifier: Apache-2.0
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". Every tile here is stored as panels
// of 64 16-bit columns: a panel is rows x 128 bytes with the 128-byte swizzle, starts on 1,024
// bytes, and is what one TMA box writes.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kSwizzleAtomBytes =
    1024;  // 8 rows of 128 bytes: the unit that the swizzle permutes within

// Orders earlier register accesses before the wgmma that follow.
ADAATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ADAATTN_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns once at most `kPending` of this warp's committed groups are unfinished.
template <int kPending>
ADAATTN_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// wgmma_wait<0> for the `true` arm of a branch whose other arm waits too: the differing text keeps
// the compiler from merging the two waits above the branch.
ADAATTN_DEVICE void wgmma_wait_all_in_branch() {
    asm volatile("wgmma.wait_group.sync.aligned 0;  // in branch" ::: "memory");
}

// Ties register values to this point of the program, so that the compiler moves none across an
// asynchronous wgmma.
template <int kCount>
ADAATTN_DEVICE void pin(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
ADAATTN_DEVICE void pin(i32 (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int kCount>
ADAATTN_DEVICE void pin(u32 (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Matrix descriptor: address >> 4 in bits 0..13, leading offset >> 4 in 16..29, stride offset >> 4
// in 32..45, swizzle in 62..63. The stride offset is the distance of 8-row groups. The leading
// offset is the distance of panels, and matters only where the panels lie along the operand's outer
// dimension (values: dim_v); where they lie along the contraction, the caller steps them. ptxas
// 13.0 crashes on a descriptor that is a compile-time constant, so `address` must come from
// run-time data.
ADAATTN_DEVICE u64 matrix_descriptor(u32 address, u32 panel_bytes) {
    constexpr u64 kSwizzle128 = 1ull << 62;
    constexpr u64 kStride = static_cast<u64>(kSwizzleAtomBytes >> 4) << 32;
    return kSwizzle128 | kStride | (static_cast<u64>(panel_bytes >> 4) << 16) |
           ((address & 0x3ffffu) >> 4);
}

// The descriptor of the same operand `bytes` further on; addresses stay below 256 KiB, so no carry
// leaves the field.
ADAATTN_DEVICE u64 advance(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// Distance in bytes from a K-major tile's start to its k-th 16-column slice.
__device__ constexpr u32 k_slice_bytes(int k, int rows) {
    return (k / 4) * rows * kPanelRowBytes + (k % 4) * 32;
}

}  // namespace adaattn::ptx
