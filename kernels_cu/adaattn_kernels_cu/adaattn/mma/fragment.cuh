// fragment.cuh -- operands of mma.sync in registers, by format, and their products.
// SPDX-License-Identifier: Apache-2.0
//
// 16-bit formats multiply 16 columns per mma, 32-bit ones 8: either way 32 bytes of a row, so one
// address pattern serves both. f32 is computed as three tf32 products of a two-term split
// (x = high + low, the low*low term dropped): relative error about 2^-22 per product.
#pragma once

#include "adaattn/common/format.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::mma {

// Accumulator fragment of 16 rows by 8 columns: lane l holds rows l/4 (elements 0, 1) and l/4 + 8
// (elements 2, 3), columns 2 (l%4) and + 1.
template <int kRowTiles, int kColumnTiles>
using Accumulator = float[kRowTiles][kColumnTiles][4];

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
                    high[i] = quant::tf32_high(x);
                    low[i] = quant::tf32_low(x, high[i]);
                } else {
                    high[i] = ptx::round_tf32(x);
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
        ptx::mma_bf16(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    } else if constexpr (kFormat == Format::f16) {
        ptx::mma_f16(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    } else {
        if constexpr (kFormat == Format::f32) {
            ptx::mma_tf32(d, a.low, b.high[kFirst], b.high[kFirst + 1]);
            ptx::mma_tf32(d, a.high, b.low[kFirst], b.low[kFirst + 1]);
        }
        ptx::mma_tf32(d, a.high, b.high[kFirst], b.high[kFirst + 1]);
    }
}

}  // namespace adaattn::mma
