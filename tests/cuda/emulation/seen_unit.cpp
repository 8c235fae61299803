// seen_unit.cpp -- which keys and rows a mask leaves visible, on a CPU, block by block.
#include "cuda_words.h"

#include "adaattn/mask/smxx_mask_seen.cuh"

namespace {
using Traits = adaattn::smxx_mask_seen::Traits<32>;
adaattn::smxx_mask_seen::Params held;
}  // namespace

extern "C" int params_bytes() { return sizeof(held); }
extern "C" void run(const adaattn::smxx_mask_seen::Params* params, int blocks) {
    held = *params;
    for (int block = 0; block < blocks; ++block) {
        adaattn::ptx::emulation::run_block(block, Traits::kThreads, 0,
                                           [] { adaattn::smxx_mask_seen::run<Traits>(held); });
    }
}
