// decode_pages.cuh -- pages to shared memory, 4 KiB at a time, and fragments of keys and values from there.
// SPDX-License-Identifier: Apache-2.0
//
// No lane needs what another reads: a product over channels does not mind their order, so each
// lane reads runs of 16 bytes and calls them the channels that mma gives it; queries are loaded in
// the same order. Products over keys mind which key is which, not which channel a row is: a lane
// reads channels 64 i + 8 (lane / 4) .. + 7 of its four keys, and owns these channels of the output.
#pragma once

#include "adaattn/attn/decode_params.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/packed.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/ptx/sm90.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_attn_decode {

constexpr int kStepKeys = 16;
constexpr int kChunkKeys = 64;
constexpr int kChunkSteps = kChunkKeys / kStepKeys;
constexpr int kColumns = 8;  // packed query rows of a tile: the N of mma.m16n8k16

// Four codes as two pairs of f16: for i8 the code itself, for e4m3 2^-8 times its number.
template <Code kCode>
ADAATTN_DEVICE void widen_codes(u32 word, u32& low, u32& high) {
    if constexpr (kCode == Code::i8) {
        // 0x6400 + u is 1024 + u, exactly, for bytes u = code + 128.
        const u32 biased = word ^ 0x80808080u;
        low = ptx::sub_f16x2(ptx::pick_bytes<0x4140>(biased, 0x64646464u), 0x64806480u);
        high = ptx::sub_f16x2(ptx::pick_bytes<0x4342>(biased, 0x64646464u), 0x64806480u);
    } else {
        // Sign, then exponent and fraction one place down: f16 with the exponent's bias 8 too low.
        const u32 first = ptx::pick_bytes<0x1404>(word, 0u);
        const u32 second = ptx::pick_bytes<0x3424>(word, 0u);
        low = (first & 0x80008000u) | ((first & 0x7f007f00u) >> 1);
        high = (second & 0x80008000u) | ((second & 0x7f007f00u) >> 1);
    }
}

// code_f16 times this is code / code_unit (adaattn_core.pages.CODE_UNIT).
template <Code kCode>
constexpr float kCodeScale = kCode == Code::i8 ? 1.0f / 128 : 1.0f / 2;

template <Format kFormat>
ADAATTN_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kFormat == Format::bf16) {
        ptx::mma_bf16(d, a, b0, b1);
    } else {
        ptx::mma_f16(d, a, b0, b1);
    }
}

// First of the two channels of a query word, for the lane's place in its quad.
ADAATTN_DEVICE int wide_channel(int word, int place) {
    return 32 * (word / 4) + 8 * place + 2 * (word % 4);
}
ADAATTN_DEVICE int narrow_channel(int word, int place) {
    return 64 * (word / 8) + 16 * place + 2 * (word % 8);
}

// --- slices -----------------------------------------------------------------------------------
// A chunk of 64 keys is read in slices of 4 KiB a warp, keys before values:
//   wide keys, values    32 keys x 64, 16 keys x 128, or 16 keys x half of 256 channels
//   narrow keys          64 keys x 64, 32 keys x 128, or 16 keys x 256 channels
//   narrow values        64 keys x 64 channels
// Slices are copied to a ring of the warp's own in shared memory, a few ahead.
constexpr int kSliceWords = 32;
constexpr int kSliceBytes = kSliceWords * 128;
using Slice = u32[kSliceWords];

template <class T>
struct Slices {
    static constexpr int kWide = T::kDim / 32, kNarrow = T::kDim / 64;  // of a chunk, K or V
    static constexpr int kWideSteps = T::kDim == 64 ? 2 : 1;            // of 16 keys in a slice
    static constexpr int kParts = T::kDim == 256 ? 2 : 1;               // slices of the same keys
    static constexpr int kNarrowSteps = 256 / T::kDim;
    static constexpr int kWideWidth = T::kDim < 128 ? T::kDim : 128;  // channels of a slice
};

// 64 keys on one page.
struct Chunk {
    int number;  // of the sequence's; its first key over 64
    bool narrow;
    i64 page;
    i64 first;  // its first key's place in the pool
};

ADAATTN_DEVICE Chunk chunk_of(const Params& p, i32 entry, int number) {
    Chunk chunk;
    chunk.number = number;
    chunk.narrow = entry >= 0;
    chunk.page = chunk.narrow ? entry : -1 - static_cast<i64>(entry);
    chunk.first = (chunk.page * p.page_chunks + number % p.page_chunks) * kChunkKeys;
    return chunk;
}

struct Units {
    float key, value;  // 0 for wide pages
};
ADAATTN_DEVICE Units units_of(const Params& p, i32 entry) {
    if (entry < 0 || !p.key_narrow.unit) return {0.0f, 0.0f};
    return {p.key_narrow.unit[entry], p.value_narrow.unit[entry]};
}

// Slices lie in shared memory as they do on the page, whole lines; a narrow side's first slice is
// followed by the page's centres and reaches. Without the copy engine, pieces of 16 bytes are permuted
// within 128, by the key, so that no bank is asked twice when fragments are read.
template <class T>
ADAATTN_DEVICE int key_place(int byte, int pitch) {
    return T::kBulk || pitch < 128 ? byte : byte ^ (byte / pitch % 2 * 64);
}
template <class T>
ADAATTN_DEVICE int value_place(int byte, int pitch) {
    return T::kBulk ? byte : byte ^ (byte / pitch / 2 % 4 * 32);
}

template <class T>
ADAATTN_DEVICE int slices_of(const Chunk& chunk) {
    return chunk.narrow ? Slices<T>::kNarrow : Slices<T>::kWide;
}

// Where a side of a chunk begins.
template <class T>
ADAATTN_DEVICE const char* side_of(const Params& p, const Chunk& chunk, bool keys) {
    const NarrowPool& pool = keys ? p.key_narrow : p.value_narrow;
    const void* data = chunk.narrow ? pool.data : keys ? p.key : p.value;
    return static_cast<const char*>(data) + chunk.first * (chunk.narrow ? T::kDim : 2 * T::kDim);
}

// Starts the copy of slice `i` of a side, which begins at `side`, to `slot` in shared memory, by the
// lanes of a warp.
template <class T>
ADAATTN_DEVICE void start_slice(const Params& p, const Chunk& chunk, const char* side, bool keys,
                                int i, u32 slot, int lane) {
    const NarrowPool& pool = keys ? p.key_narrow : p.value_narrow;
    const bool runs = T::kDim == 256 && !chunk.narrow;
    const char* from = side + (runs ? i / 2 * 2 * kSliceBytes + i % 2 * 256 : i * kSliceBytes);
    const int pitch = chunk.narrow ? T::kDim : 2 * Slices<T>::kWideWidth;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
        const int byte = 512 * l + 16 * lane;
        const int place = keys ? key_place<T>(byte, pitch) : value_place<T>(byte, pitch);
        ptx::copy_async_16(slot + place, from + (runs ? byte + byte / 256 * 256 : byte), true);
    }
    if (!chunk.narrow || i > 0) return;
    const char* centre = reinterpret_cast<const char*>(pool.centre + chunk.page * T::kDim);
    const char* reach = reinterpret_cast<const char*>(pool.reach + chunk.page * T::kDim);
#pragma unroll
    for (int byte = 0; byte < 4 * T::kDim; byte += 512) {
        const int at = byte + 16 * lane;
        if (at < 4 * T::kDim) {
            const char* source = at < 2 * T::kDim ? centre + at : reach + at - 2 * T::kDim;
            ptx::copy_async_16(slot + kSliceBytes + at, source, true);
        }
    }
}

// Keys of a slice: a lane's keys are lane / 4 and + 8 of every 16, its chunks lane % 4 of every four.
template <class T, bool kNarrow>
ADAATTN_DEVICE void read_keys(Slice& x, u32 slot, int lane) {
    constexpr int kPitch = kNarrow ? T::kDim : 2 * Slices<T>::kWideWidth;
    constexpr int kLoads = kPitch / 64;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
        const int key = l / (2 * kLoads) * kStepKeys + l % 2 * 8 + lane / 4;
        const int byte = key * kPitch + l / 2 % kLoads * 64 + lane % 4 * 16;
        u32 four[4];
        ptx::load_shared_128(four, slot + key_place<T>(byte, kPitch));
#pragma unroll
        for (int w = 0; w < 4; ++w) x[4 * l + w] = four[w];
    }
}

// Values of a slice: a lane's keys are 2 (lane % 4) + {0, 1, 8, 9} of every 16.
template <class T>
ADAATTN_DEVICE void read_wide_values(Slice& x, u32 slot, int lane) {
    constexpr int kPitch = 2 * Slices<T>::kWideWidth, kLoads = kPitch / 128;
#pragma unroll
    for (int l = 0; l < 8; ++l) {
        const int key = l / (4 * kLoads) * kStepKeys + l % 2 + l / 2 % 2 * 8 + lane % 4 * 2;
        const int byte = key * kPitch + l / 4 % kLoads * 128 + lane / 4 * 16;
        u32 four[4];
        ptx::load_shared_128(four, slot + value_place<T>(byte, kPitch));
#pragma unroll
        for (int w = 0; w < 4; ++w) x[4 * l + w] = four[w];
    }
}

// 64 channels of all 64 keys, which lie in kNarrow slices.
template <class T>
ADAATTN_DEVICE void read_narrow_values(Slice& x, const u32 (&slots)[Slices<T>::kNarrow], int block,
                                       int lane) {
    constexpr int kKeys = kSliceBytes / T::kDim;
#pragma unroll
    for (int l = 0; l < 16; ++l) {
        const int key = l / 4 * kStepKeys + l % 2 + l / 2 % 2 * 8;  // and 2 (lane % 4) more
        const int byte = (key % kKeys + lane % 4 * 2) * T::kDim + 64 * block + lane / 4 * 8;
        ptx::load_shared_64(x[2 * l], x[2 * l + 1],
                            slots[key / kKeys] + value_place<T>(byte, T::kDim));
    }
}

// --- products ---------------------------------------------------------------------------------
// S = K Q^T; words of `query` are in the order of `wide_channel`.
template <class T>
ADAATTN_DEVICE void use_wide_keys(float (&s)[kChunkSteps][T::kTiles][4], const Slice& x, int slice,
                                  const u32 (&query)[T::kTiles][T::kWords]) {
    constexpr int kLoads = Slices<T>::kWideWidth / 32;
    const int first = slice / Slices<T>::kParts * Slices<T>::kWideSteps;
    const int word = slice % Slices<T>::kParts * 16;
#pragma unroll
    for (int step = 0; step < Slices<T>::kWideSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int at = (step * kLoads + i) * 8;
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                const u32 a[4] = {x[at + w], x[at + 4 + w], x[at + w + 1], x[at + 5 + w]};
#pragma unroll
                for (int tile = 0; tile < T::kTiles; ++tile) {
                    mma<T::kInput>(s[first + step][tile], a, query[tile][word + 4 * i + w],
                                   query[tile][word + 4 * i + w + 1]);
                }
            }
        }
    }
}

// The same of codes; words of `query` are in the order of `narrow_channel`.
template <class T>
ADAATTN_DEVICE void use_narrow_keys(float (&s)[kChunkSteps][T::kTiles][4], const Slice& x,
                                    int slice, const u32 (&query)[T::kTiles][T::kWords]) {
    constexpr int kLoads = T::kDim / 64, kSteps = Slices<T>::kNarrowSteps;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int at = (step * kLoads + i) * 8;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                u32 a[4];
                widen_codes<T::kKeyCode>(x[at + w], a[0], a[2]);
                widen_codes<T::kKeyCode>(x[at + 4 + w], a[1], a[3]);
#pragma unroll
                for (int tile = 0; tile < T::kTiles; ++tile) {
                    mma<Format::f16>(s[slice * kSteps + step][tile], a, query[tile][8 * i + 2 * w],
                                     query[tile][8 * i + 2 * w + 1]);
                }
            }
        }
    }
}

// O^T += V^T P^T; keys for which `sees` has no bit (4 to a step) are read as 0: nobody sees them.
template <class T>
ADAATTN_DEVICE void use_wide_values(float (&o)[T::kTiles][T::kOutTiles][4], const Slice& x,
                                    int slice, const u32 (&weights)[kChunkSteps][T::kTiles][2],
                                    u32 sees) {
    constexpr int kLoads = Slices<T>::kWideWidth / 64;
    const int first = slice / Slices<T>::kParts * Slices<T>::kWideSteps;
    const int part = slice % Slices<T>::kParts * 8;
#pragma unroll
    for (int step = 0; step < Slices<T>::kWideSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 w[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const bool seen = sees >> (4 * (first + step) + k) & 1u;
                    w[k] = seen ? x[((step * kLoads + i) * 4 + k) * 4 + j] : 0u;
                }
                const u32 a[4] = {
                    ptx::pick_bytes<0x5410>(w[0], w[1]), ptx::pick_bytes<0x7632>(w[0], w[1]),
                    ptx::pick_bytes<0x5410>(w[2], w[3]), ptx::pick_bytes<0x7632>(w[2], w[3])};
#pragma unroll
                for (int tile = 0; tile < T::kTiles; ++tile) {
                    mma<T::kInput>(o[tile][part + 4 * i + j], a, weights[first + step][tile][0],
                                   weights[first + step][tile][1]);
                }
            }
        }
    }
}

// Unscaled sums of the 64 channels. Codes are always finite: unseen ones need no care.
template <class T>
ADAATTN_DEVICE void use_narrow_values(float (&o)[T::kTiles][4][4], const Slice& x,
                                      const u32 (&weights)[kChunkSteps][T::kTiles][2]) {
#pragma unroll
    for (int step = 0; step < kChunkSteps; ++step) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            u32 a[2][4];  // channels 4 w + {0, 1}, and {2, 3}
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const u32 here = x[(step * 4 + k) * 2 + w], next = x[(step * 4 + k + 1) * 2 + w];
                widen_codes<T::kValueCode>(ptx::pick_bytes<0x5140>(here, next), a[0][k],
                                           a[0][k + 1]);
                widen_codes<T::kValueCode>(ptx::pick_bytes<0x7362>(here, next), a[1][k],
                                           a[1][k + 1]);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int tile = 0; tile < T::kTiles; ++tile) {
                    mma<Format::f16>(o[tile][2 * w + h], a[h], weights[step][tile][0],
                                     weights[step][tile][1]);
                }
            }
        }
    }
}

}  // namespace adaattn::smxx_attn_decode
