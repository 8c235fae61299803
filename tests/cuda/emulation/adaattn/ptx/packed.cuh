// packed.cuh -- packed bytes and halves, 8x8 matrices across a warp: emulated (see sm80.cuh beside).
#pragma once

#include "adaattn/ptx/sm80.cuh"

namespace adaattn::ptx {

template <u32 kSelector>
ADAATTN_DEVICE u32 pick_bytes(u32 low, u32 high) {
    const u64 both = low | static_cast<u64>(high) << 32;
    u32 x = 0;
    for (int i = 0; i < 4; ++i) {
        x |= static_cast<u32>(both >> 8 * (kSelector >> 4 * i & 7u) & 255u) << 8 * i;
    }
    return x;
}

namespace emulation {
template <class Operation>
inline u32 both_halves(u32 a, u32 b, Operation operation) {
    const auto half = [&](int shift) {
        return static_cast<u32>(to_f16(operation(from_f16(static_cast<u16>(a >> shift)),
                                                 from_f16(static_cast<u16>(b >> shift)))))
               << shift;
    };
    return half(0) | half(16);
}
}  // namespace emulation

ADAATTN_DEVICE u32 sub_f16x2(u32 a, u32 b) {
    return emulation::both_halves(a, b, [](float x, float y) { return x - y; });
}
ADAATTN_DEVICE u32 mul_f16x2(u32 a, u32 b) {
    return emulation::both_halves(a, b, [](float x, float y) { return x * y; });
}

ADAATTN_DEVICE u32 transpose_8x8(u32 x) {
    emulation::Machine& m = emulation::machine;
    m.slots[m.current][0] = x;
    emulation::meet_warp();
    const int first = emulation::warp_first(), row = emulation::lane() / 4;
    u32 y = 0;
    for (int i = 0; i < 2; ++i) {
        const int from = 2 * (emulation::lane() % 4) + i;
        y |= (m.slots[first + 4 * from + row / 2][0] >> 16 * (row % 2) & 0xffffu) << 16 * i;
    }
    emulation::meet_warp();
    return y;
}

ADAATTN_DEVICE float broadcast(float x, int from);
ADAATTN_DEVICE int broadcast(int x, int from) {
    return static_cast<int>(float_bits(broadcast(bits_float(static_cast<u32>(x)), from)));
}
ADAATTN_DEVICE float broadcast(float x, int from) {
    emulation::Machine& m = emulation::machine;
    m.slots[m.current][0] = float_bits(x);
    emulation::meet_warp();
    const u32 y = m.slots[emulation::warp_first() + from][0];
    emulation::meet_warp();
    return bits_float(y);
}

ADAATTN_DEVICE void load_shared_64(u32& x, u32& y, u32 address) {
    memcpy(&x, emulation::at(address, 8), 4);
    memcpy(&y, emulation::at(address, 8) + 4, 4);
}

}  // namespace adaattn::ptx
