// types.cuh -- integer names, element tags and constants shared by every kernel. SPDX-License-Identifier: Apache-2.0
//
// NVRTC compiles these sources without the standard library, so the few types needed are spelled here.
#pragma once

namespace adaattn {

using i32 = int;
using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Element tags: the names of adaattn_core.formats, capitalised. They carry no storage; both are 16 bits wide.
struct Bf16 {};
struct F16 {};

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr u32 kFullWarp = 0xffffffffu;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

__device__ constexpr int ceil_div(int numerator, int denominator) { return (numerator + denominator - 1) / denominator; }
__device__ constexpr int round_up(int value, int multiple) { return ceil_div(value, multiple) * multiple; }

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

}  // namespace adaattn
