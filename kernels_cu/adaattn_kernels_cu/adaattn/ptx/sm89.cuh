// sm89.cuh -- instructions that need compute capability 8.9. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// PTX ISA, "cvt": cvt.rn.satfinite.e4m3x2.f32, to nearest even; beyond 448, Inf included, it is
// 448, and NaN stays NaN. The first argument becomes the lowest byte.
ADAATTN_DEVICE u32 pack_e4m3(float first, float second, float third, float fourth) {
    u32 packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed)
        : "f"(first), "f"(second), "f"(third), "f"(fourth));
    return packed;
}

}  // namespace adaattn::ptx
