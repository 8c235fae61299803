// sm80_format.cuh -- operand formats: how a number is stored in shared memory and multiplied.
//
// 16-bit formats multiply 16 columns per mma, 32-bit ones 8: either way 32 bytes of a row, so one
// address pattern serves both. f32 is computed as three tf32 products of a two-term split
// (x = high + low, the low*low term dropped): relative error about 2^-22 per product.
#pragma once

#include "adaattn/ptx/sm80_ptx.cuh"

namespace adaattn::sm80 {

enum class Format : int { bf16, f16, tf32, f32 };

__host__ __device__ constexpr bool is_narrow(Format format) {
    return format == Format::bf16 || format == Format::f16;
}
__host__ __device__ constexpr int storage_bytes(Format format) {
    return is_narrow(format) ? 2 : 4;
}

// --- conversion between stored types -----------------------------------------------------------
// Input types of arrays are the formats that have a storage type of their own: bf16, f16, f32.
template <Format kInput>
ADAATTN_DEVICE float load_element(const void* base, i64 index) {
    if constexpr (kInput == Format::f32) {
        return static_cast<const float*>(base)[index];
    } else {
        const u16 bits = static_cast<const u16*>(base)[index];
        return kInput == Format::bf16 ? from_bf16(bits) : from_f16(bits);
    }
}

template <Format kTo>
ADAATTN_DEVICE u32 pack_pair(float low, float high) {
    static_assert(is_narrow(kTo), "two numbers to a register only in 16-bit formats");
    return kTo == Format::bf16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Largest finite f16; a plan that asks for f16 operands saturates there, NaN stays NaN.
ADAATTN_DEVICE float saturate_f16(float x) {
    const float limit = 65504.0f;
    return x > limit ? limit : (x < -limit ? -limit : x);
}

// --- tf32 splitting ----------------------------------------------------------------------------
// high = x to 11 significant bits, ties away from zero. An Inf stays one; a NaN may turn into any
// number, but then `low` is NaN.
ADAATTN_DEVICE u32 tf32_high(u32 x) { return (x + 0x1000u) & 0xffffe000u; }
// low = x - high is exact; the tensor core reads it to 11 significant bits.
ADAATTN_DEVICE u32 tf32_low(u32 x, u32 high) {
    return float_bits(add_rn(bits_float(x), -bits_float(high)));
}

// --- products ----------------------------------------------------------------------------------
// A fragment with the split that its format needs; `low` is empty for all but f32.
template <Format kFormat, int kRegisters>
struct Fragment {
    u32 high[kRegisters];
    u32 low[kFormat == Format::f32 ? kRegisters : 1];

    ADAATTN_DEVICE void split() {
        if constexpr (!is_narrow(kFormat)) {
#pragma unroll
            for (int i = 0; i < kRegisters; ++i) {
                const u32 x = high[i];
                if constexpr (kFormat == Format::f32) {
                    high[i] = tf32_high(x);
                    low[i] = tf32_low(x, high[i]);
                } else {
                    high[i] = round_tf32(x);
                }
            }
        }
    }
};

// d += a * b for the n8 block whose operand registers are b[kFirst], b[kFirst + 1]. The small
// products of a split go first.
template <Format kFormat, int kFirst, int kRegisters>
ADAATTN_DEVICE void multiply(float (&d)[4], const Fragment<kFormat, 4>& a,
                             const Fragment<kFormat, kRegisters>& b) {
    if constexpr (kFormat == Format::bf16) {
        mma_bf16(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    } else if constexpr (kFormat == Format::f16) {
        mma_f16(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    } else {
        if constexpr (kFormat == Format::f32) {
            mma_tf32(d, a.low, b.high[kFirst], b.high[kFirst + 1]);
            mma_tf32(d, a.high, b.low[kFirst], b.low[kFirst + 1]);
        }
        mma_tf32(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    }
}

}  // namespace adaattn::sm80
