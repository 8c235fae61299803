// packed.cuh -- instructions on packed bytes and halves, and on 8x8 matrices across a warp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// PTX: prmt.b32. Byte i of the result is byte `selector >> 4 i & 7` of {low, high}.
template <u32 kSelector>
ADAATTN_DEVICE u32 pick_bytes(u32 low, u32 high) {
    u32 x;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(low), "r"(high), "n"(kSelector));
    return x;
}

// PTX: sub.f16x2, mul.rn.f16x2.
ADAATTN_DEVICE u32 sub_f16x2(u32 a, u32 b) {
    u32 x;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}
ADAATTN_DEVICE u32 mul_f16x2(u32 a, u32 b) {
    u32 x;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}

// PTX: movmatrix. Lane l gives elements (l/4, 2(l%4)..) of an 8x8 matrix of 16-bit numbers and
// receives those of its transpose.
ADAATTN_DEVICE u32 transpose_8x8(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

ADAATTN_DEVICE float broadcast(float x, int lane) { return __shfl_sync(kFullWarp, x, lane); }
ADAATTN_DEVICE int broadcast(int x, int lane) { return __shfl_sync(kFullWarp, x, lane); }

ADAATTN_DEVICE void load_shared_64(u32& x, u32& y, u32 address) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(address));
}

}  // namespace adaattn::ptx
