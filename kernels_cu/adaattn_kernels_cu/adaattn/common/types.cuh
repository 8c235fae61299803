// types.cuh -- integer names, constants and small helpers shared by every kernel.
// SPDX-License-Identifier: Apache-2.0
//
// Plain C++ only, so that the headers built on it also compile for a CPU (tests/cuda/emulation).
// NVRTC has no standard library: the few types needed are spelled here.
#pragma once

// Every device function is inlined: a kernel is one function.
#define ADAATTN_DEVICE __device__ __forceinline__

namespace adaattn {

using i32 = int;
using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr u32 kFullWarp = 0xffffffffu;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLargestF32 = 3.402823466e+38f;
constexpr float kLn2 = 0.6931471805599453f;

__host__ __device__ constexpr int ceil_div(int numerator, int denominator) {
    return (numerator + denominator - 1) / denominator;
}
__host__ __device__ constexpr int round_up(int value, int multiple) {
    return ceil_div(value, multiple) * multiple;
}

ADAATTN_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
ADAATTN_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// A choice made at compile time, as an argument.
template <bool kValue>
struct Flag {
    static constexpr bool value = kValue;
};

// Blocks of a kernel that are to fit a multiprocessor at once: T::kBlocks, or 1.
template <class T>
constexpr auto resident_blocks(int) -> decltype(T::kBlocks) {
    return T::kBlocks;
}
template <class T>
constexpr int resident_blocks(...) {
    return 1;
}

}  // namespace adaattn
