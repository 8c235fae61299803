// sm90.cuh -- instructions of Hopper: emulated (see sm80.cuh beside); fences are nothing.
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::ptx {

ADAATTN_DEVICE void async_proxy_fence() {}
ADAATTN_DEVICE void await_earlier_kernels() {}
ADAATTN_DEVICE void let_next_kernel_start() {}
ADAATTN_DEVICE bool elect_lane() { return emulation::lane() == 0; }

}  // namespace adaattn::ptx
