// warpgroup.cuh -- named barriers and register hand-over between warpgroups.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

// PTX ISA, "setmaxnreg": every warp of a warpgroup executes it, in one branch per role; counts are
// multiples of 8.
template <int kRegisters>
ADAATTN_DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
ADAATTN_DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// PTX ISA, "barrier.sync / barrier.arrive": `threads` counts those that wait and those that only
// arrive.
ADAATTN_DEVICE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

ADAATTN_DEVICE void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether any of `threads` threads says so; they all wait for each other. PTX ISA, "barrier.red".
ADAATTN_DEVICE bool named_barrier_any(u32 id, u32 threads, bool mine) {
    u32 found;
    asm volatile(
        "{\n"
        ".reg .pred own, all;\n"
        "setp.ne.u32 own, %1, 0;\n"
        "barrier.red.or.pred all, %2, %3, own;\n"
        "selp.u32 %0, 1, 0, all;\n"
        "}\n"
        : "=r"(found)
        : "r"(static_cast<u32>(mine)), "r"(id), "r"(threads)
        : "memory");
    return found != 0;
}

// A value that the compiler may take as the same in all lanes of a warp.
ADAATTN_DEVICE int warp_uniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

}  // namespace adaattn::ptx
