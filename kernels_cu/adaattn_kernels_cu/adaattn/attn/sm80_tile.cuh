// sm80_tile.cuh -- a tile of rows in shared memory: its layout, how it is filled, how it is read.
//
// Layout: rows of kPitch bytes (a multiple of 128); the 16-byte chunk c of row r sits at chunk
// c ^ (r % 8). Eight rows at one logical chunk then lie in eight different bank groups, which is
// what ldmatrix, the 16-byte copies and the column reads of a 32-bit value tile need.
#pragma once

#include "adaattn/attn/sm80_format.cuh"

namespace adaattn::sm80 {

template <Format kFormat, int kRows_, int kDim_>
struct Tile {
    static constexpr int kRows = kRows_;
    static constexpr int kDim = kDim_;
    static constexpr int kElementBytes = storage_bytes(kFormat);
    static constexpr int kChunks = kDim * kElementBytes / 16;  // per row, padding left out
    static constexpr int kPitch = (kDim * kElementBytes + 127) / 128 * 128;
    static constexpr int kBytes = kRows * kPitch;

    static_assert(kDim % 32 == 0, "head dimensions are padded to multiples of 32");
    static_assert(kRows % 16 == 0, "tiles are made of 16-row fragments");

    ADAATTN_DEVICE static u32 chunk_offset(int row, int chunk) {
        return static_cast<u32>(row * kPitch + ((chunk ^ (row & 7)) << 4));
    }
    ADAATTN_DEVICE static u32 element_offset(int row, int column) {
        constexpr int kPerChunk = 16 / kElementBytes;
        return chunk_offset(row, column / kPerChunk) + (column % kPerChunk) * kElementBytes;
    }
};

// Rows of a global array: row r of the tile is `base + r * stride` elements; rows outside
// [first, last) and columns at or beyond `dim` are zeros and are never read.
struct RowSource {
    const void* base;
    i64 stride;
    int first, last, dim;
};

// Fills a tile. kAsync: 16-byte cp.async, which needs equal types and 16-byte aligned rows; the
// caller commits and waits. Otherwise element by element, converting: ready after a block barrier.
template <class TileT, Format kFormat, Format kInput, bool kAsync, int kThreads>
ADAATTN_DEVICE void fill_tile(u32 tile, const RowSource& source) {
    constexpr int kPerChunk = 16 / TileT::kElementBytes;
    constexpr int kCopies = TileT::kRows * TileT::kChunks;
    if constexpr (kAsync && kThreads % TileT::kChunks == 0 && kCopies % kThreads == 0) {
        // A thread keeps its column and walks down the rows with one addition each.
        constexpr int kRowStep = kThreads / TileT::kChunks;
        const int row = thread_index() / TileT::kChunks, chunk = thread_index() % TileT::kChunks;
        const bool column_valid = chunk * kPerChunk < source.dim;
        const char* from = static_cast<const char*>(source.base) +
                           (row * source.stride + chunk * kPerChunk) * TileT::kElementBytes;
#pragma unroll
        for (int i = 0; i < kCopies / kThreads; ++i) {
            const int at = row + i * kRowStep;
            copy_async_16(tile + TileT::chunk_offset(at, chunk), from,
                          column_valid && at >= source.first && at < source.last);
            from += kRowStep * source.stride * TileT::kElementBytes;
        }
        return;
    }
#pragma unroll 1
    for (int i = thread_index(); i < kCopies; i += kThreads) {
        const int row = i / TileT::kChunks, chunk = i % TileT::kChunks;
        const bool inside = row >= source.first && row < source.last;
        const int column = chunk * kPerChunk;
        const i64 index = row * source.stride + column;
        const u32 address = tile + TileT::chunk_offset(row, chunk);
        if constexpr (kAsync) {
            copy_async_16(address,
                          static_cast<const char*>(source.base) + index * TileT::kElementBytes,
                          inside && column < source.dim);
        } else {
            float x[kPerChunk];
#pragma unroll
            for (int e = 0; e < kPerChunk; ++e) {
                const bool valid = inside && column + e < source.dim;
                x[e] = valid ? load_element<kInput>(source.base, index + e) : 0.0f;
                if constexpr (kFormat == Format::f16 && kInput != Format::f16) {
                    x[e] = saturate_f16(x[e]);
                }
            }
            u32 packed[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (is_narrow(kFormat)) {
                    packed[e] = pack_pair<kFormat>(x[2 * e], x[2 * e + 1]);
                } else {
                    packed[e] = float_bits(x[e]);
                }
            }
            store_shared_128(address, packed);
        }
    }
}

// One element of a tile, as float.
template <Format kFormat>
ADAATTN_DEVICE float shared_element(u32 address) {
    if constexpr (kFormat == Format::bf16) {
        return from_bf16(load_shared_16(address));
    } else if constexpr (kFormat == Format::f16) {
        return from_f16(load_shared_16(address));
    } else {
        return bits_float(load_shared_32(address));
    }
}

// Per-lane start address of an operand whose rows are MMA rows (queries) ...
template <class TileT>
ADAATTN_DEVICE u32 row_operand(u32 tile, int first_row, int lane) {
    return tile + TileT::chunk_offset(first_row + (lane & 15), lane >> 4);
}
// ... or MMA columns (keys of Q*K^T): 16 keys by 32 bytes, as two n8 blocks ...
template <class TileT>
ADAATTN_DEVICE u32 column_operand(u32 tile, int lane) {
    return tile + TileT::chunk_offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// ... moved to k-step `step` (32 bytes along the row) and `rows` rows down (a multiple of 8).
// The swizzle is an XOR on bits 4..6, so only whole 128-byte lines may be added.
template <class TileT>
ADAATTN_DEVICE u32 moved(u32 address, int step, int rows) {
    return (address ^ static_cast<u32>((step & 3) << 5)) + (step >> 2) * 128 +
           rows * TileT::kPitch;
}

}  // namespace adaattn::sm80
