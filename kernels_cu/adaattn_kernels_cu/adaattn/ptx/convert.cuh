// convert.cuh -- 16-bit packing and the approximate exponential. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// 2^x, error below 2 ulp of f32; 2^-inf = 0. PTX ISA, "ex2".
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x within 1 ulp. PTX ISA, "rcp".
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounds two f32 to nearest even and packs them, `low` in bits 0..15. PTX ISA, "cvt".
__device__ __forceinline__ u32 pack(Bf16, float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 pack(F16, float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u16 narrow(Bf16 tag, float x) { return static_cast<u16>(pack(tag, x, 0.0f)); }
__device__ __forceinline__ u16 narrow(F16 tag, float x) { return static_cast<u16>(pack(tag, x, 0.0f)); }

__device__ __forceinline__ float widen(Bf16, u16 bits) { return __int_as_float(static_cast<int>(bits) << 16); }

__device__ __forceinline__ float widen(F16, u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

}  // namespace adaattn::ptx
