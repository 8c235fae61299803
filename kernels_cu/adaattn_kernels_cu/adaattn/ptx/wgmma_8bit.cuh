// wgmma_8bit.cuh -- m64nNk32 of 8-bit operands, one specialisation per N and element type.
// SPDX-License-Identifier: Apache-2.0
//
// PTX ISA, "wgmma.mma_async". D (64 x N, registers) = A x B (+ D unless `accumulate` is 0); both
// operands K-major, the only order that 8-bit operands have.
//   ss: A and B in shared memory: i8 into i32 (exact), e4m3 into f32.
//   rs: A in registers, e4m3 only.
// Fragment of D: as in wgmma_f16.cuh. Fragment of A: lane t of a quad holds the four bytes 4 t ..
// 4 t + 3 of row t / 4 in a[0], of the row 8 below in a[1], and the same of bytes 16 .. 31 in a[2]
// and a[3].
#pragma once

#include "adaattn/common/format.cuh"
#include "adaattn/ptx/wgmma_f16.cuh"

namespace adaattn::ptx {

// clang-format off
// ADAATTN_Tn: the first n operand numbers as text; ADAATTN_Dn: the first n accumulators.
#define ADAATTN_T32                                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ADAATTN_T64 ADAATTN_T32                                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ADAATTN_T128 ADAATTN_T64                                                                              \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                      \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                        \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "            \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ADAATTN_EIGHT(C, i)                                                                                   \
    C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define ADAATTN_D32(C)                                                                                        \
    ADAATTN_EIGHT(C, 0), ADAATTN_EIGHT(C, 8), ADAATTN_EIGHT(C, 16), ADAATTN_EIGHT(C, 24)
#define ADAATTN_D64(C) ADAATTN_D32(C),                                                                        \
    ADAATTN_EIGHT(C, 32), ADAATTN_EIGHT(C, 40), ADAATTN_EIGHT(C, 48), ADAATTN_EIGHT(C, 56)
#define ADAATTN_D128(C) ADAATTN_D64(C),                                                                       \
    ADAATTN_EIGHT(C, 64), ADAATTN_EIGHT(C, 72), ADAATTN_EIGHT(C, 80), ADAATTN_EIGHT(C, 88),                   \
    ADAATTN_EIGHT(C, 96), ADAATTN_EIGHT(C, 104), ADAATTN_EIGHT(C, 112), ADAATTN_EIGHT(C, 120)

// N: columns; H: N / 2; P0 .. P5: the operand numbers that follow the N / 2 accumulators.
#define ADAATTN_WGMMA_8BIT(N, H, P0, P1, P2, P3, P4, P5)                                                      \
    template <>                                                                                               \
    struct Wgmma<Format::i8, N> {                                                                             \
        ADAATTN_DEVICE static void ss(i32 (&d)[H], u64 a, u64 b, int accumulate) {                            \
            asm volatile(                                                                                     \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                             \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8"                                        \
                " {" ADAATTN_T##H "}, %" #P0 ", %" #P1 ", p;\n}\n"                                            \
                : ADAATTN_D##H("+r")                                                                          \
                : "l"(a), "l"(b), "r"(accumulate));                                                           \
        }                                                                                                     \
    };                                                                                                        \
    template <>                                                                                               \
    struct Wgmma<Format::e4m3, N> {                                                                           \
        ADAATTN_DEVICE static void ss(float (&d)[H], u64 a, u64 b, int accumulate) {                          \
            asm volatile(                                                                                     \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                             \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"                                    \
                " {" ADAATTN_T##H "}, %" #P0 ", %" #P1 ", p, 1, 1;\n}\n"                                      \
                : ADAATTN_D##H("+f")                                                                          \
                : "l"(a), "l"(b), "r"(accumulate));                                                           \
        }                                                                                                     \
        ADAATTN_DEVICE static void rs(float (&d)[H], const u32* a, u64 b, int accumulate) {                   \
            asm volatile(                                                                                     \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                             \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"                                    \
                " {" ADAATTN_T##H "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1;\n}\n"      \
                : ADAATTN_D##H("+f")                                                                          \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                       \
        }                                                                                                     \
    };

ADAATTN_WGMMA_8BIT(64, 32, 32, 33, 34, 35, 36, 37)
ADAATTN_WGMMA_8BIT(128, 64, 64, 65, 66, 67, 68, 69)
ADAATTN_WGMMA_8BIT(256, 128, 128, 129, 130, 131, 132, 133)

#undef ADAATTN_WGMMA_8BIT
#undef ADAATTN_D128
#undef ADAATTN_D64
#undef ADAATTN_D32
#undef ADAATTN_EIGHT
#undef ADAATTN_T128
#undef ADAATTN_T64
#undef ADAATTN_T32
// clang-format on

}  // namespace adaattn::ptx
