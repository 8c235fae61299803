// sm80_tile.cuh -- a tile of rows in shared memory: its layout, how it is filled, how it is read.
// SPDX-License-Identifier: Apache-2.0
//
// Layout: rows of kPitch bytes (a multiple of 128); the 16-byte chunk c of row r sits at chunk
// c ^ (r % 8). Eight rows at one logical chunk then lie in eight different bank groups, which is
// what ldmatrix, the 16-byte copies and the column reads of a 32-bit value tile need.
#pragma once

#include "adaattn/common/format.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::tile {

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

// Copies rows of one global array into tiles. kAsync: 16-byte cp.async, which needs equal types and
// 16-byte aligned rows; the caller commits and waits. Otherwise element by element, converting:
// ready after a block barrier.
template <class TileT, Format kFormat, Format kInput, bool kAsync, int kThreads>
class Filler {
    static constexpr int kPerChunk = 16 / TileT::kElementBytes;
    static constexpr int kCopies = TileT::kRows * TileT::kChunks;
    // A thread then keeps its column and walks down the rows with one addition each.
    static constexpr bool kWalks =
        kAsync && kThreads % TileT::kChunks == 0 && kCopies % kThreads == 0;
    static constexpr int kRowStep = kWalks ? kThreads / TileT::kChunks : 1;

    const char* base_;
    i64 stride_;
    int dim_;

  public:
    // `base` is row 0 of the array, `stride` its row stride in elements, `dim` its columns.
    ADAATTN_DEVICE Filler(const void* base, i64 stride, int dim)
        : base_(static_cast<const char*>(base)), stride_(stride), dim_(dim) {}

    // Row r of the tile becomes row first_row + r of the array. Rows outside [valid_begin,
    // valid_end) and columns at or beyond `dim` become zeros and are never read.
    ADAATTN_DEVICE void fill(u32 tile, int first_row, int valid_begin, int valid_end) const {
        const int begin = valid_begin - first_row, end = valid_end - first_row;
        if constexpr (kWalks) {
            const int own_row = ptx::thread_index() / TileT::kChunks;
            const int chunk = ptx::thread_index() % TileT::kChunks;
            const bool column_valid = chunk * kPerChunk < dim_;
            const char* from = base_ + ((first_row + own_row) * stride_ + chunk * kPerChunk) *
                                           TileT::kElementBytes;
#pragma unroll 8
            for (int i = 0; i < kCopies / kThreads; ++i) {
                const int row = own_row + i * kRowStep;
                ptx::copy_async_16(tile + TileT::chunk_offset(row, chunk), from,
                                   column_valid && row >= begin && row < end);
                from += kRowStep * stride_ * TileT::kElementBytes;
            }
        } else {
#pragma unroll 1
            for (int i = ptx::thread_index(); i < kCopies; i += kThreads) {
                const int row = i / TileT::kChunks, chunk = i % TileT::kChunks;
                const i64 index = (first_row + row) * stride_ + chunk * kPerChunk;
                fill_chunk(tile + TileT::chunk_offset(row, chunk), index,
                           row >= begin && row < end ? dim_ - chunk * kPerChunk : 0);
            }
        }
    }

  private:
    // The chunk at element `index`, of which the first `count` elements are valid.
    ADAATTN_DEVICE void fill_chunk(u32 address, i64 index, int count) const {
        if constexpr (kAsync) {
            ptx::copy_async_16(address, base_ + index * TileT::kElementBytes, count > 0);
        } else {
            float x[kPerChunk];
#pragma unroll
            for (int e = 0; e < kPerChunk; ++e) {
                x[e] = e < count ? quant::load_element<kInput>(base_, index + e) : 0.0f;
                if constexpr (kFormat == Format::f16 && kInput != Format::f16) {
                    x[e] = quant::saturate_f16(x[e]);
                }
            }
            u32 packed[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (is_narrow(kFormat)) {
                    packed[e] = quant::pack_pair<kFormat>(x[2 * e], x[2 * e + 1]);
                } else {
                    packed[e] = ptx::float_bits(x[e]);
                }
            }
            ptx::store_shared_128(address, packed);
        }
    }
};

// Where a block's K and V tiles come from: row 0 of each, and the rows that may be read.
struct FillSource {
    const void* key;
    const void* value;
    int start, stop;
};

ADAATTN_DEVICE void store_fill_source(u32 address, const FillSource& source) {
    const u64 key = reinterpret_cast<u64>(source.key);
    const u64 value = reinterpret_cast<u64>(source.value);
    const u32 pointers[4] = {static_cast<u32>(key), static_cast<u32>(key >> 32),
                             static_cast<u32>(value), static_cast<u32>(value >> 32)};
    const u32 rows[4] = {static_cast<u32>(source.start), static_cast<u32>(source.stop), 0u, 0u};
    ptx::store_shared_128(address, pointers);
    ptx::store_shared_128(address + 16, rows);
}

ADAATTN_DEVICE FillSource load_fill_source(u32 address) {
    u32 pointers[4], rows[4];
    ptx::load_shared_128(pointers, address);
    ptx::load_shared_128(rows, address + 16);
    const auto join = [](u32 low, u32 high) {
        return reinterpret_cast<const void*>(static_cast<u64>(high) << 32 | low);
    };
    return {join(pointers[0], pointers[1]), join(pointers[2], pointers[3]),
            static_cast<int>(rows[0]), static_cast<int>(rows[1])};
}

// One element of a tile, as float.
template <Format kFormat>
ADAATTN_DEVICE float shared_element(u32 address) {
    if constexpr (kFormat == Format::bf16) {
        return ptx::from_bf16(ptx::load_shared_16(address));
    } else if constexpr (kFormat == Format::f16) {
        return ptx::from_f16(ptx::load_shared_16(address));
    } else {
        return ptx::bits_float(ptx::load_shared_32(address));
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
    return (address ^ static_cast<u32>((step & 3) << 5)) + (step >> 2) * 128 + rows * TileT::kPitch;
}

}  // namespace adaattn::tile
