// convert.cuh -- numbers from one format to another: loads, packing, saturation, tf32 splits.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/format.cuh"
#include "adaattn/ptx/sm80.cuh"

namespace adaattn::quant {

// 16 stored bits as a float, exactly.
template <Format kFrom>
ADAATTN_DEVICE float widen(u16 bits) {
    static_assert(is_narrow(kFrom), "16-bit formats");
    return kFrom == Format::bf16 ? ptx::from_bf16(bits) : ptx::from_f16(bits);
}

// Two floats rounded to nearest even, `low` in bits 0..15.
template <Format kTo>
ADAATTN_DEVICE u32 pack_pair(float low, float high) {
    static_assert(is_narrow(kTo), "two numbers to a register only in 16-bit formats");
    return kTo == Format::bf16 ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}

template <Format kTo>
ADAATTN_DEVICE u16 narrow(float x) {
    return static_cast<u16>(pack_pair<kTo>(x, 0.0f));
}

// Element `index` of an array of type kInput.
template <Format kInput>
ADAATTN_DEVICE float load_element(const void* base, i64 index) {
    if constexpr (kInput == Format::f32) {
        return static_cast<const float*>(base)[index];
    } else {
        return widen<kInput>(static_cast<const u16*>(base)[index]);
    }
}

// A plan that asks for f16 operands saturates finite numbers; NaN and Inf stay what they are.
ADAATTN_DEVICE float saturate_f16(float x) {
    const float limit = 65504.0f;
    const bool beyond = (x > limit && x < ptx::infinity()) || (x < -limit && x > -ptx::infinity());
    return beyond ? (x > 0.0f ? limit : -limit) : x;
}

// high = x to 11 significant bits, ties away from zero. An Inf stays one, and what rounds beyond
// the largest tf32 becomes one; a NaN may turn into any number, but then `low` is NaN.
ADAATTN_DEVICE u32 tf32_high(u32 x) { return (x + 0x1000u) & 0xffffe000u; }
// low = x - high is exact; the tensor core reads it to 11 significant bits.
ADAATTN_DEVICE u32 tf32_low(u32 x, u32 high) {
    return ptx::float_bits(ptx::add_rn(ptx::bits_float(x), -ptx::bits_float(high)));
}

// Whether a number of the format, as an operand of a product, is NaN or Inf. Stored are the low 16
// bits of a narrow format, and of a wide one an f32 that is rounded to tf32 when it is read.
template <Format kFormat>
ADAATTN_DEVICE bool is_nonfinite_operand(u32 stored) {
    if constexpr (is_narrow(kFormat)) {
        constexpr u32 kExponent = kFormat == Format::bf16 ? 0x7f80u : 0x7c00u;
        return (stored & kExponent) == kExponent;
    } else {
        return (stored & 0x7fffffffu) >= 0x7f7ff000u;
    }
}

}  // namespace adaattn::quant
