// sm90.cuh -- instructions of Hopper: emulated (see sm80.cuh beside); fences are nothing.
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::ptx {

ADAATTN_DEVICE void async_proxy_fence() {}
ADAATTN_DEVICE bool elect_lane() { return emulation::lane() == 0; }

}  // namespace adaattn::ptx
