// mbarrier.cuh -- barriers that count arrivals and bytes: emulated (see sm80.cuh beside).
//
// What the copy engine brings lands when somebody waits for it, no sooner: reading without a wait
// finds what was there before. A wait that nothing will end is an error.
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::ptx {

namespace emulation {
struct Bulk {
    u32 to;
    const void* from;
    u32 bytes;
};
struct Barrier {
    u32 arrivals = 0, pending = 0, phase = 0;
    i64 bytes = 0;  // announced, and not brought
    std::vector<Bulk> copies;
};
inline std::vector<Barrier> barriers(kSmemLimit / 8);

inline Barrier& barrier_at(u32 address) {
    at(address, 8);
    return barriers[address / 8];
}

inline bool complete(Barrier& b) {
    if (b.pending != 0 || b.bytes != 0) return false;
    ++b.phase;
    b.pending = b.arrivals;
    return true;
}
}  // namespace emulation

ADAATTN_DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    emulation::Barrier& b = emulation::barrier_at(barrier);
    b = emulation::Barrier();
    b.arrivals = b.pending = arrivals;
}
ADAATTN_DEVICE void mbarrier_init_fence() {}

ADAATTN_DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    emulation::Barrier& b = emulation::barrier_at(barrier);
    if (b.pending == 0) {
        fprintf(stderr, "one arrival too many\n");
        abort();
    }
    --b.pending;
    b.bytes += bytes;
    emulation::complete(b);
}
ADAATTN_DEVICE void mbarrier_arrive(u32 barrier) { mbarrier_arrive_expect(barrier, 0); }

ADAATTN_DEVICE bool mbarrier_test(u32 barrier, u32 parity) {
    emulation::Barrier& b = emulation::barrier_at(barrier);
    const bool done = (b.phase & 1u) != parity;
    if (!done) emulation::give_way();
    return done;
}

ADAATTN_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    emulation::Barrier& b = emulation::barrier_at(barrier);
    for (int turns = 0; (b.phase & 1u) == parity; ++turns) {
        for (const emulation::Bulk& copy : b.copies) {
            memcpy(emulation::at(copy.to, 16), copy.from, copy.bytes);
            b.bytes -= copy.bytes;
        }
        b.copies.clear();
        if (emulation::complete(b)) break;
        if (turns > 10000) {
            fprintf(stderr, "a wait that nothing ends\n");
            abort();
        }
        emulation::give_way();
    }
}

}  // namespace adaattn::ptx
