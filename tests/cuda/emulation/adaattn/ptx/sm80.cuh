// sm80.cuh -- the instruction header of the sm80 family, emulated on a CPU for tests.
//
// It takes the place of the shipped header of the same name (include order), so the kernel's own
// source runs unchanged. Every CUDA thread is a fiber; a fiber runs until it meets the others of
// its warp or block. Asynchronous copies are delayed until the matching wait, shared memory starts
// as NaN, and addresses are checked: a forgotten wait or barrier gives wrong numbers, not luck.
// Products are summed in double: layout and control flow are tested here, rounding on a GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#include "adaattn/common/types.cuh"

namespace adaattn::ptx {

namespace emulation {

constexpr int kSmemLimit = 232448;
constexpr size_t kStack = 64 * 1024;

struct Copy {
    u32 address;
    unsigned char bytes[16];
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;  // committed copies that have not landed
    std::vector<Copy> open;
    bool done = false;
};

struct Meeting {
    int count = 0;
    u32 generation = 0;
};

struct Machine {
    unsigned char smem[kSmemLimit];
    int smem_bytes = 0;
    u32 block = 0;
    int threads = 0, current = 0;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting everyone;
    u32 slots[1024][8];
    bool votes[1024];
    ucontext_t scheduler;
    void (*body)() = nullptr;
};

inline Machine machine;

inline void give_way() {
    swapcontext(&machine.fibers[machine.current].context, &machine.scheduler);
}

inline void meet(Meeting& meeting, int size) {
    const u32 generation = meeting.generation;
    if (++meeting.count == size) {
        meeting.count = 0;
        ++meeting.generation;
    } else {
        while (meeting.generation == generation) {
            give_way();
        }
    }
}

inline int lane() { return machine.current & 31; }
inline int warp_first() { return machine.current & ~31; }
inline void meet_warp() { meet(machine.warps[machine.current / 32], 32); }

inline unsigned char* at(u32 address, u32 bytes) {
    if (address % bytes != 0 || address + bytes > static_cast<u32>(machine.smem_bytes)) {
        fprintf(stderr, "shared access of %u bytes at %u of %d\n", bytes, address,
                machine.smem_bytes);
        abort();
    }
    return machine.smem + address;
}

inline void refuse_unaligned(const void* global, int bytes) {
    if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
        fprintf(stderr, "misaligned access to global memory\n");
        abort();
    }
}

// Copies land in any order: none may go where one is still on its way.
inline void refuse_second_copy(const Copy& other, u32 address) {
    if (other.address == address) {
        fprintf(stderr, "two copies on their way to one place\n");
        abort();
    }
}

inline void start_fiber() {
    machine.body();
    machine.fibers[machine.current].done = true;
    give_way();
}

// Runs one block of `threads` threads to its end.
inline void run_block(u32 block, int threads, int smem_bytes, void (*body)()) {
    Machine& m = machine;
    memset(m.smem, 0xff, smem_bytes);
    m.block = block;
    m.threads = threads;
    m.smem_bytes = smem_bytes;
    m.body = body;
    m.fibers.resize(threads);
    m.warps = std::vector<Meeting>(threads / 32);
    m.everyone = Meeting();
    for (Fiber& fiber : m.fibers) {
        fiber.stack.resize(kStack);
        fiber.groups.clear();
        fiber.open.clear();
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start_fiber, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (m.current = 0; m.current < threads; ++m.current) {
            if (!m.fibers[m.current].done) {
                running = true;
                swapcontext(&m.scheduler, &m.fibers[m.current].context);
            }
        }
    }
}

inline float float_of(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline u32 bits_of(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}

}  // namespace emulation

ADAATTN_DEVICE int thread_index() { return emulation::machine.current; }
ADAATTN_DEVICE u32 block_index() { return emulation::machine.block; }

ADAATTN_DEVICE u32 float_bits(float x) { return emulation::bits_of(x); }
ADAATTN_DEVICE float bits_float(u32 x) { return emulation::float_of(x); }
ADAATTN_DEVICE float infinity() { return emulation::float_of(0x7f800000u); }
ADAATTN_DEVICE float not_a_number() { return emulation::float_of(0x7fc00000u); }

ADAATTN_DEVICE u16 to_bf16(float x) {
    const u32 bits = float_bits(x);
    if (x != x) {
        return 0x7fff;
    }
    return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ADAATTN_DEVICE u16 to_f16(float x) {
    const _Float16 y = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
}
ADAATTN_DEVICE float from_f16(u16 bits) {
    _Float16 y;
    memcpy(&y, &bits, 2);
    return static_cast<float>(y);
}
ADAATTN_DEVICE float from_bf16(u16 bits) { return bits_float(static_cast<u32>(bits) << 16); }
ADAATTN_DEVICE u32 pack_bf16(float low, float high) {
    return to_bf16(low) | static_cast<u32>(to_bf16(high)) << 16;
}
ADAATTN_DEVICE u32 pack_f16(float low, float high) {
    return to_f16(low) | static_cast<u32>(to_f16(high)) << 16;
}
ADAATTN_DEVICE u32 round_tf32(u32 x) {
    return bits_float(x) != bits_float(x) ? 0x7fffffffu : (x + 0x1000u) & 0xffffe000u;
}

ADAATTN_DEVICE float exp2_approx(float x) { return exp2f(x); }
ADAATTN_DEVICE float reciprocal_approx(float x) { return 1.0f / x; }
ADAATTN_DEVICE float log2_accurate(float x) { return log2f(x); }
ADAATTN_DEVICE float tanh_accurate(float x) { return tanhf(x); }
ADAATTN_DEVICE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
ADAATTN_DEVICE float add_rn(float a, float b) { return a + b; }
ADAATTN_DEVICE float mul_rn(float a, float b) { return a * b; }
ADAATTN_DEVICE float max_number(float a, float b) { return fmaxf(a, b); }

ADAATTN_DEVICE u32 shuffle_xor(u32 x, int mask) {
    emulation::Machine& m = emulation::machine;
    m.slots[m.current][0] = x;
    emulation::meet_warp();
    const u32 y = m.slots[m.current ^ mask][0];
    emulation::meet_warp();
    return y;
}
ADAATTN_DEVICE float shuffle_xor(float x, int mask) {
    return bits_float(shuffle_xor(float_bits(x), mask));
}
ADAATTN_DEVICE bool warp_any(bool x) {
    emulation::Machine& m = emulation::machine;
    m.votes[m.current] = x;
    emulation::meet_warp();
    bool any = false;
    for (int i = 0; i < 32; ++i) {
        any |= m.votes[emulation::warp_first() + i];
    }
    emulation::meet_warp();
    return any;
}
ADAATTN_DEVICE void block_sync() {
    emulation::meet(emulation::machine.everyone, emulation::machine.threads);
}
ADAATTN_DEVICE bool block_sync_or(bool x) {
    emulation::Machine& m = emulation::machine;
    m.votes[m.current] = x;
    block_sync();
    bool any = false;
    for (int i = 0; i < m.threads; ++i) {
        any |= m.votes[i];
    }
    block_sync();
    return any;
}

ADAATTN_DEVICE u32 shared_base() { return 0; }
ADAATTN_DEVICE unsigned char* shared_bytes() { return emulation::machine.smem; }
ADAATTN_DEVICE u32 load_shared_32(u32 address) {
    u32 x;
    memcpy(&x, emulation::at(address, 4), 4);
    return x;
}
ADAATTN_DEVICE u16 load_shared_16(u32 address) {
    u16 x;
    memcpy(&x, emulation::at(address, 2), 2);
    return x;
}
ADAATTN_DEVICE void load_shared_128(u32 (&x)[4], u32 address) {
    memcpy(x, emulation::at(address, 16), 16);
}
ADAATTN_DEVICE void store_shared_128(u32 address, const u32 (&x)[4]) {
    memcpy(emulation::at(address, 16), x, 16);
}

ADAATTN_DEVICE void copy_async_16(u32 address, const void* global, bool valid) {
    emulation::Copy copy{address, {}};
    if (valid) {
        emulation::refuse_unaligned(global, 16);
        memcpy(copy.bytes, global, 16);
    }
    emulation::Fiber& fiber = emulation::machine.fibers[emulation::machine.current];
    for (const auto& group : fiber.groups) {
        for (const emulation::Copy& other : group) emulation::refuse_second_copy(other, address);
    }
    fiber.open.push_back(copy);
}
ADAATTN_DEVICE void copy_async_commit() {
    emulation::Fiber& fiber = emulation::machine.fibers[emulation::machine.current];
    fiber.groups.push_back(fiber.open);
    fiber.open.clear();
}
template <int kPending>
ADAATTN_DEVICE void copy_async_wait() {
    emulation::Fiber& fiber = emulation::machine.fibers[emulation::machine.current];
    while (fiber.groups.size() > kPending) {
        for (const emulation::Copy& copy : fiber.groups.front()) {
            memcpy(emulation::at(copy.address, 16), copy.bytes, 16);
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

// Rows of the 8x8 matrices come from the lanes' addresses, elements go to lanes row by row.
ADAATTN_DEVICE void load_matrices(u32 (&x)[4], u32 address) {
    emulation::Machine& m = emulation::machine;
    m.slots[m.current][0] = address;
    emulation::meet_warp();
    const int first = emulation::warp_first(), lane = emulation::lane();
    for (int matrix = 0; matrix < 4; ++matrix) {
        const u32 row = m.slots[first + 8 * matrix + lane / 4][0];
        memcpy(&x[matrix], emulation::at(row, 16) + 4 * (lane % 4), 4);
    }
    emulation::meet_warp();
}
ADAATTN_DEVICE void load_matrices_transposed(u32 (&x)[4], u32 address) {
    emulation::Machine& m = emulation::machine;
    m.slots[m.current][0] = address;
    emulation::meet_warp();
    const int first = emulation::warp_first(), lane = emulation::lane();
    for (int matrix = 0; matrix < 4; ++matrix) {
        u16 pair[2];
        for (int i = 0; i < 2; ++i) {
            const u32 row = m.slots[first + 8 * matrix + 2 * (lane % 4) + i][0];
            memcpy(&pair[i], emulation::at(row, 16) + 2 * (lane / 4), 2);
        }
        memcpy(&x[matrix], pair, 4);
    }
    emulation::meet_warp();
}

namespace emulation {

// D (16 x 8) += A (16 x kDepth) B (kDepth x 8), fragments as the PTX ISA lays them out.
// element(register, position in register) -> value; kPerRegister elements to a register.
template <int kDepth, int kPerRegister, class Element>
inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Element element) {
    Machine& m = machine;
    u32* mine = m.slots[m.current];
    memcpy(mine, a, 16);
    mine[4] = b0;
    mine[5] = b1;
    meet_warp();
    const int first = warp_first(), row = lane() / 4, column = 2 * (lane() % 4);
    for (int i = 0; i < 4; ++i) {
        const int at_row = row + 8 * (i / 2), at_column = column + i % 2;
        double sum = d[i];
        for (int k = 0; k < kDepth; ++k) {
            // Both operands: half the depth per register pair, kPerRegister neighbours per lane.
            const int upper = k / (kDepth / 2), within = k % (kDepth / 2);
            const int thread = within / kPerRegister, position = within % kPerRegister;
            const u32 x = m.slots[first + 4 * (at_row % 8) + thread][2 * upper + at_row / 8];
            const u32 y = m.slots[first + 4 * at_column + thread][4 + upper];
            sum += static_cast<double>(element(x, position)) * element(y, position);
        }
        d[i] = static_cast<float>(sum);
    }
    meet_warp();
}

}  // namespace emulation

ADAATTN_DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulation::multiply<16, 2>(
        d, a, b0, b1, [](u32 x, int i) { return from_bf16(static_cast<u16>(x >> (16 * i))); });
}
ADAATTN_DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulation::multiply<16, 2>(
        d, a, b0, b1, [](u32 x, int i) { return from_f16(static_cast<u16>(x >> (16 * i))); });
}
ADAATTN_DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulation::multiply<8, 1>(d, a, b0, b1,
                              [](u32 x, int) { return emulation::float_of(x & 0xffffe000u); });
}

ADAATTN_DEVICE void load_global_128(u32 (&x)[4], const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        fprintf(stderr, "misaligned 16-byte load\n");
        abort();
    }
    memcpy(x, global, 16);
}
ADAATTN_DEVICE void add_global(float* global, float x) { *global += x; }

ADAATTN_DEVICE void store_global_64(void* global, u32 low, u32 high) {
    if (reinterpret_cast<uintptr_t>(global) % 8 != 0) {
        fprintf(stderr, "misaligned 8-byte store\n");
        abort();
    }
    memcpy(global, &low, 4);
    memcpy(static_cast<char*>(global) + 4, &high, 4);
}

}  // namespace adaattn::ptx
