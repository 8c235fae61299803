// format.cuh -- number formats by name: those of adaattn_core.formats that kernels multiply.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn {

// Arrays hold bf16, f16 or f32; tf32 is an operand format, stored as f32; i8 and e4m3 are operand
// formats with scales, stored by the quantiser.
enum class Format : int { bf16, f16, tf32, f32, i8, e4m3 };

__host__ __device__ constexpr bool is_narrow(Format format) {
    return format == Format::bf16 || format == Format::f16;
}
__host__ __device__ constexpr bool is_quantised(Format format) {
    return format == Format::i8 || format == Format::e4m3;
}
__host__ __device__ constexpr int storage_bytes(Format format) {
    return is_quantised(format) ? 1 : is_narrow(format) ? 2 : 4;
}

}  // namespace adaattn
