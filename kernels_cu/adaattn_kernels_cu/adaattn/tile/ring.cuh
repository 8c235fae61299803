// ring.cuh -- buffers used in order, again and again. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn::tile {

// A ring of buffers used in order: the buffer of the count-th use, and the parity of the phase that
// its `full` barrier then completes.
template <int kSize>
struct Ring {
    static_assert((kSize & (kSize - 1)) == 0,
                  "a power of two, so that one counter serves index and parity");
    ADAATTN_DEVICE static int index(int count) { return count & (kSize - 1); }
    ADAATTN_DEVICE static u32 parity(int count) { return static_cast<u32>(count / kSize) & 1u; }
};

}  // namespace adaattn::tile
