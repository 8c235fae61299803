// wgmma_f16.cuh -- m64nNk16 with f32 accumulators, one specialisation per N and element type.
// SPDX-License-Identifier: Apache-2.0
//
// PTX ISA, "wgmma.mma_async". D (64 x N, f32, registers) = A x B (+ D unless `accumulate` is 0).
//   ss: A and B in shared memory, both K-major (queries x keys).
//   ss_rows: both in shared memory, A K-major, B MN-major (gradients of scores x keys as stored).
//   rs: A in registers (probabilities), B in shared memory, MN-major (values as stored).
// Fragment of D: warp w, lane t of the warpgroup hold rows 16 w + t / 4 (d[4 j], d[4 j + 1]) and 8
// below (d[4 j + 2], d[4 j + 3]) of columns 8 j + 2 (t % 4) + {0, 1}. Rounded to 16 bits it is, pair
// by pair, the A fragment of the next product.
#pragma once

#include "adaattn/common/format.cuh"

namespace adaattn::ptx {

template <Format kFormat, int kN>
struct Wgmma;

// clang-format off
// ADAATTN_Tn: the first 8 n operand numbers as text; ADAATTN_Dn: the first 8 n accumulators.
#define ADAATTN_T1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ADAATTN_T2 ADAATTN_T1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ADAATTN_T3 ADAATTN_T2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ADAATTN_T4 ADAATTN_T3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ADAATTN_T5 ADAATTN_T4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ADAATTN_T6 ADAATTN_T5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ADAATTN_T7 ADAATTN_T6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ADAATTN_T8 ADAATTN_T7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ADAATTN_T9 ADAATTN_T8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ADAATTN_T10 ADAATTN_T9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ADAATTN_T11 ADAATTN_T10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ADAATTN_T12 ADAATTN_T11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ADAATTN_T13 ADAATTN_T12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ADAATTN_T14 ADAATTN_T13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ADAATTN_T15 ADAATTN_T14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ADAATTN_T16 ADAATTN_T15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ADAATTN_REGS8(i)                                                                                          \
    "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]),            \
        "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define ADAATTN_D1 ADAATTN_REGS8(0)
#define ADAATTN_D2 ADAATTN_D1, ADAATTN_REGS8(1)
#define ADAATTN_D3 ADAATTN_D2, ADAATTN_REGS8(2)
#define ADAATTN_D4 ADAATTN_D3, ADAATTN_REGS8(3)
#define ADAATTN_D5 ADAATTN_D4, ADAATTN_REGS8(4)
#define ADAATTN_D6 ADAATTN_D5, ADAATTN_REGS8(5)
#define ADAATTN_D7 ADAATTN_D6, ADAATTN_REGS8(6)
#define ADAATTN_D8 ADAATTN_D7, ADAATTN_REGS8(7)
#define ADAATTN_D9 ADAATTN_D8, ADAATTN_REGS8(8)
#define ADAATTN_D10 ADAATTN_D9, ADAATTN_REGS8(9)
#define ADAATTN_D11 ADAATTN_D10, ADAATTN_REGS8(10)
#define ADAATTN_D12 ADAATTN_D11, ADAATTN_REGS8(11)
#define ADAATTN_D13 ADAATTN_D12, ADAATTN_REGS8(12)
#define ADAATTN_D14 ADAATTN_D13, ADAATTN_REGS8(13)
#define ADAATTN_D15 ADAATTN_D14, ADAATTN_REGS8(14)
#define ADAATTN_D16 ADAATTN_D15, ADAATTN_REGS8(15)

// N: columns; G: N / 16; P0..P5: the operand numbers that follow the N / 2 accumulators.
#define ADAATTN_WGMMA(FORMAT, TYPE, N, G, P0, P1, P2, P3, P4, P5)                                             \
    template <>                                                                                                \
    struct Wgmma<FORMAT, N> {                                                                                 \
        ADAATTN_DEVICE static void ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {           \
            asm volatile(                                                                                      \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                              \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                \
                " {" ADAATTN_T##G "}, %" #P0 ", %" #P1 ", p, 1, 1, 0, 0;\n}\n"                                 \
                : ADAATTN_D##G                                                                                 \
                : "l"(a), "l"(b), "r"(accumulate));                                                            \
        }                                                                                                      \
        ADAATTN_DEVICE static void ss_rows(float (&d)[N / 2], u64 a, u64 b, int accumulate) {      \
            asm volatile(                                                                                      \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                              \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                \
                " {" ADAATTN_T##G "}, %" #P0 ", %" #P1 ", p, 1, 1, 0, 1;\n}\n"                                 \
                : ADAATTN_D##G                                                                                 \
                : "l"(a), "l"(b), "r"(accumulate));                                                            \
        }                                                                                                      \
        ADAATTN_DEVICE static void rs(float (&d)[N / 2], const u32* a, u64 b, int accumulate) {    \
            asm volatile(                                                                                      \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                              \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                                \
                " {" ADAATTN_T##G "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, 1;\n}\n"    \
                : ADAATTN_D##G                                                                                 \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                        \
        }                                                                                                      \
    };
#define ADAATTN_WGMMA_BOTH(N, G, P0, P1, P2, P3, P4, P5)       \
    ADAATTN_WGMMA(Format::bf16, "bf16", N, G, P0, P1, P2, P3, P4, P5)  \
    ADAATTN_WGMMA(Format::f16, "f16", N, G, P0, P1, P2, P3, P4, P5)

ADAATTN_WGMMA_BOTH(32, 2, 16, 17, 18, 19, 20, 21)
ADAATTN_WGMMA_BOTH(64, 4, 32, 33, 34, 35, 36, 37)
ADAATTN_WGMMA_BOTH(80, 5, 40, 41, 42, 43, 44, 45)
ADAATTN_WGMMA_BOTH(96, 6, 48, 49, 50, 51, 52, 53)
ADAATTN_WGMMA_BOTH(112, 7, 56, 57, 58, 59, 60, 61)
ADAATTN_WGMMA_BOTH(128, 8, 64, 65, 66, 67, 68, 69)
ADAATTN_WGMMA_BOTH(144, 9, 72, 73, 74, 75, 76, 77)
ADAATTN_WGMMA_BOTH(160, 10, 80, 81, 82, 83, 84, 85)
ADAATTN_WGMMA_BOTH(176, 11, 88, 89, 90, 91, 92, 93)
ADAATTN_WGMMA_BOTH(192, 12, 96, 97, 98, 99, 100, 101)
ADAATTN_WGMMA_BOTH(256, 16, 128, 129, 130, 131, 132, 133)

#undef ADAATTN_WGMMA_BOTH
#undef ADAATTN_WGMMA
#undef ADAATTN_REGS8
#undef ADAATTN_T1
#undef ADAATTN_D1
#undef ADAATTN_T2
#undef ADAATTN_D2
#undef ADAATTN_T3
#undef ADAATTN_D3
#undef ADAATTN_T4
#undef ADAATTN_D4
#undef ADAATTN_T5
#undef ADAATTN_D5
#undef ADAATTN_T6
#undef ADAATTN_D6
#undef ADAATTN_T7
#undef ADAATTN_D7
#undef ADAATTN_T8
#undef ADAATTN_D8
#undef ADAATTN_T9
#undef ADAATTN_D9
#undef ADAATTN_T10
#undef ADAATTN_D10
#undef ADAATTN_T11
#undef ADAATTN_D11
#undef ADAATTN_T12
#undef ADAATTN_D12
#undef ADAATTN_T13
#undef ADAATTN_D13
#undef ADAATTN_T14
#undef ADAATTN_D14
#undef ADAATTN_T15
#undef ADAATTN_D15
#undef ADAATTN_T16
#undef ADAATTN_D16
// clang-format on

}  // namespace adaattn::ptx
