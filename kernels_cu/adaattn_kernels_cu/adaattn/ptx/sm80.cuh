// sm80.cuh -- instructions of every GPU from Ampere on, one per function (PTX ISA 8.x).
// SPDX-License-Identifier: Apache-2.0
//
// Whatever is not plain C++ in the sm80 family stands here and nowhere else, so that a test can
// put an emulation in this header's place and run its kernels on a CPU.
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// --- where am I ------------------------------------------------------------------------------
ADAATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// Volatile, so that what follows from it can be computed again instead of being kept in registers.
ADAATTN_DEVICE u32 block_index() {
    u32 x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

// --- bits ------------------------------------------------------------------------------------
ADAATTN_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
ADAATTN_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
ADAATTN_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
ADAATTN_DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// --- conversions (round to nearest even) -----------------------------------------------------
// Low half first, as the fragments of mma want it. PTX: cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32.
ADAATTN_DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
ADAATTN_DEVICE u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
ADAATTN_DEVICE float from_f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
ADAATTN_DEVICE float from_bf16(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

// PTX: cvt.rna.tf32.f32, to nearest, ties away from zero; NaN stays NaN.
ADAATTN_DEVICE u32 round_tf32(u32 x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
}

// --- arithmetic ------------------------------------------------------------------------------
// PTX: ex2.approx.ftz.f32, relative error 2^-22; ex2(-inf) = +0.
ADAATTN_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// PTX: rcp.approx.ftz.f32, within 1 ulp.
ADAATTN_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
ADAATTN_DEVICE float log2_accurate(float x) { return log2f(x); }
ADAATTN_DEVICE float tanh_accurate(float x) { return tanhf(x); }
ADAATTN_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Neither may be contracted into an fma: the first operand of a split must round as written.
ADAATTN_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ADAATTN_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ADAATTN_DEVICE float max_number(float a, float b) { return fmaxf(a, b); }  // drops a NaN

// --- warp and block --------------------------------------------------------------------------
ADAATTN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kFullWarp, x, mask); }
ADAATTN_DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(kFullWarp, x, mask); }
ADAATTN_DEVICE bool warp_any(bool x) { return __any_sync(kFullWarp, x); }
ADAATTN_DEVICE void block_sync() { __syncthreads(); }
ADAATTN_DEVICE bool block_sync_or(bool x) { return __syncthreads_or(x); }

// --- shared memory ---------------------------------------------------------------------------
// Addresses are 32-bit offsets into the shared window, as the instructions below take them.
ADAATTN_DEVICE u32 shared_base() {
    extern __shared__ __align__(128) unsigned char adaattn_smem[];
    return static_cast<u32>(__cvta_generic_to_shared(adaattn_smem));
}
ADAATTN_DEVICE unsigned char* shared_bytes() {
    extern __shared__ __align__(128) unsigned char adaattn_smem[];
    return adaattn_smem;
}
ADAATTN_DEVICE u32 load_shared_32(u32 address) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}
ADAATTN_DEVICE u16 load_shared_16(u32 address) {
    u16 x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address));
    return x;
}
ADAATTN_DEVICE void load_shared_128(u32 (&x)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
ADAATTN_DEVICE void store_shared_128(u32 address, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

// PTX: cp.async.cg, 16 bytes past L1; where `valid` is false nothing is read and zeros arrive.
ADAATTN_DEVICE void copy_async_16(u32 address, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address),
                 "l"(global), "r"(bytes)
                 : "memory");
}
ADAATTN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ADAATTN_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores ----------------------------------------------------------------------------
// PTX: ldmatrix.x4. Lane l gives the address of row l%8 of 8x8 matrix l/8 (16-bit elements, or
// 8x4 of 32-bit ones); it receives elements (l/4, 2(l%4)..) of matrices 0..3.
ADAATTN_DEVICE void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
ADAATTN_DEVICE void load_matrices_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}

// PTX: mma.m16n8k16 (16-bit) and mma.m16n8k8 (tf32), float accumulators. Lane l holds of
// D: rows l/4 and l/4+8, columns 2(l%4) and +1. tf32 operands are read to 10 fraction bits.
ADAATTN_DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ADAATTN_DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ADAATTN_DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- global memory ---------------------------------------------------------------------------
ADAATTN_DEVICE void load_global_128(u32 (&x)[4], const void* global) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(global));
}
ADAATTN_DEVICE void add_global(float* global, float x) { atomicAdd(global, x); }
ADAATTN_DEVICE void store_global_64(void* global, u32 low, u32 high) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(low), "r"(high) : "memory");
}

}  // namespace adaattn::ptx
