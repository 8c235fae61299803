// cuda_words.h -- what CUDA C++ has built in, for kernels whose threads are fibers (adaattn/ptx/sm80.cuh).
//
// Blocks run one after the other, so shared variables are static; they keep what the block before left.
#pragma once

#include "cpu.h"

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

#include "adaattn/ptx/sm80.cuh"

#define __shared__ static

namespace words {
using adaattn::u32;
using adaattn::ptx::emulation::machine;
struct Index {
    u32 x;
};
inline u32 grid = 1;

template <class T>
T exchange(T value, int from) {
    static_assert(sizeof(T) == 4, "one word");
    memcpy(&machine.slots[machine.current][0], &value, 4);
    adaattn::ptx::emulation::meet_warp();
    const int first = adaattn::ptx::emulation::warp_first();
    const bool inside = from >= 0 && from < 32;
    T found;
    memcpy(&found, &machine.slots[first + (inside ? from : machine.current - first)][0], 4);
    adaattn::ptx::emulation::meet_warp();
    return found;
}
}  // namespace words

#define threadIdx (words::Index{static_cast<unsigned>(words::machine.current)})
#define blockIdx (words::Index{words::machine.block})
#define gridDim (words::Index{words::grid})

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void __syncthreads() {
    adaattn::ptx::emulation::meet(words::machine.everyone, words::machine.threads);
}
inline int __syncthreads_count(bool x) {
    adaattn::ptx::emulation::Machine& m = words::machine;
    m.votes[m.current] = x;
    __syncthreads();
    int count = 0;
    for (int i = 0; i < m.threads; ++i) count += m.votes[i];
    __syncthreads();
    return count;
}
inline void __syncwarp() { adaattn::ptx::emulation::meet_warp(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return words::exchange(value, adaattn::ptx::emulation::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
    return words::exchange(value, adaattn::ptx::emulation::lane() - step);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
    return words::exchange(value, adaattn::ptx::emulation::lane() + step);
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class Number>
inline Number atomicAdd(Number* to, Number value) {
    const Number before = *to;
    *to += value;
    return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __int_as_float(int x) { return adaattn::ptx::emulation::float_of(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __log2f(float x) { return log2f(x); }
inline unsigned __vcmpgeu4(unsigned a, unsigned b) {
    unsigned found = 0;
    for (int i = 0; i < 32; i += 8) found |= ((a >> i & 255u) >= (b >> i & 255u) ? 255u : 0u) << i;
    return found;
}
