// tma.cuh -- the copy engine's contiguous copies: emulated (see mbarrier.cuh beside).
#pragma once

#include "adaattn/ptx/mbarrier.cuh"

namespace adaattn::ptx {

ADAATTN_DEVICE void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
    emulation::refuse_unaligned(source, 16);
    emulation::at(destination, 16);
    emulation::at(destination + bytes - 16, 16);
    emulation::barrier_at(barrier).copies.push_back({destination, source, bytes});
}

}  // namespace adaattn::ptx
