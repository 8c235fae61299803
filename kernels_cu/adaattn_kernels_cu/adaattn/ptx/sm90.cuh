// sm90.cuh -- Hopper's instructions that are neither matrix products nor barriers nor tensor copies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// Makes this thread's ordinary writes to shared memory visible to the copy engine and the matrix
// unit, once a barrier follows. PTX ISA, "fence.proxy.async".
ADAATTN_DEVICE void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What was before this kernel on its stream has ended, and its writes are seen; until then a kernel
// that is started early reads nothing. PTX ISA, "griddepcontrol".
ADAATTN_DEVICE void await_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The kernel after this one may be started, if it waits so.
ADAATTN_DEVICE void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// True in one lane of a warp that is together; what that lane does takes uniform operands. PTX ISA,
// "elect.sync".
ADAATTN_DEVICE bool elect_lane() {
    u32 chosen;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(chosen));
    return chosen != 0;
}

// PTX ISA, "stmatrix", transposed: lane l gives the address of row l % 8 of matrix l / 8 as it will
// lie in memory; its registers hold the matrices as mma leaves them, by columns of that row.
ADAATTN_DEVICE void store_matrices_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}

ADAATTN_DEVICE void store_shared_f32x2(u32 address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
ADAATTN_DEVICE void load_shared_f32x2(float (&x)[2], u32 address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(address));
}

// Words through which blocks wait for each other. PTX ISA, "ld.acquire", "red.release".
ADAATTN_DEVICE u32 load_acquire(const u32* global) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(global) : "memory");
    return x;
}
ADAATTN_DEVICE void add_release(u32* global, u32 x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global), "r"(x) : "memory");
}

// Adds `bytes` (a multiple of 16) of f32 in shared memory to global memory. PTX ISA,
// "cp.reduce.async.bulk".
ADAATTN_DEVICE void bulk_reduce_add(float* to, u32 from, u32 bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
}
ADAATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// This thread's bulk copies have read their sources ...
ADAATTN_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// ... or have landed.
ADAATTN_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace adaattn::ptx
