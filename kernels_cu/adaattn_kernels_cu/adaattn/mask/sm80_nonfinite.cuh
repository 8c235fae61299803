// sm80_nonfinite.cuh -- keeps NaN and Inf of values from rows that do not see their keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/mask/array_mask.cuh"
#include "adaattn/mask/interval.cuh"
#include "adaattn/mma/sm80_products.cuh"
#include "adaattn/quant/convert.cuh"
#include "adaattn/tile/sm80_tile.cuh"

namespace adaattn::mask {

// Whether the 16-byte chunks that this thread filled hold a NaN or an Inf.
template <class TileT, Format kFormat, int kThreads>
ADAATTN_DEVICE bool holds_nonfinite(u32 tile) {
    bool found = false;
    for (int i = ptx::thread_index(); i < TileT::kRows * TileT::kChunks; i += kThreads) {
        u32 x[4];
        ptx::load_shared_128(x, tile + TileT::chunk_offset(i / TileT::kChunks, i % TileT::kChunks));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            found |= quant::is_nonfinite_operand<kFormat>(x[e]);
            if constexpr (is_narrow(kFormat)) {
                found |= quant::is_nonfinite_operand<kFormat>(x[e] >> 16);
            }
        }
    }
    return found;
}

// Zeros the NaN and Inf of a value tile; every thread of the block takes part.
template <class TileT, Format kFormat, int kThreads>
ADAATTN_DEVICE void zero_nonfinite(u32 tile) {
    for (int i = ptx::thread_index(); i < TileT::kRows * TileT::kChunks; i += kThreads) {
        u32 x[4];
        const u32 address = tile + TileT::chunk_offset(i / TileT::kChunks, i % TileT::kChunks);
        ptx::load_shared_128(x, address);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            constexpr bool kNarrow = is_narrow(kFormat);
            if (kNarrow && quant::is_nonfinite_operand<kFormat>(x[e] >> 16)) {
                x[e] &= 0x0000ffffu;
            }
            if (quant::is_nonfinite_operand<kFormat>(x[e])) {
                x[e] &= kNarrow ? 0xffff0000u : 0u;
            }
        }
        ptx::store_shared_128(address, x);
    }
}

// A value that is NaN or Inf, or becomes one as an operand, must reach the rows that see its key and
// no others, but 0 * NaN is NaN. Rare, so simple: add such values to the outputs that see them, then
// zero them in the tile.
template <class T>
ADAATTN_DEVICE void separate_nonfinite(mma::Output<T>& out, u32 value, const WorkItem& item,
                                       const ArrayMask& arrays, int first_row, int first_key) {
    using ValueTile = typename T::ValueTile;
    const int lane = ptx::thread_index() & 31;
#pragma unroll 1
    for (int k = 0; k < T::kTileN; ++k) {
        bool sees[T::kRowTiles][2];
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * m + 8 * half + lane / 4;
                const int key = first_key + k;
                sees[m][half] = row < item.rows && mask::visible(item, row).holds(key);
                if constexpr (T::kArrayMask) {
                    sees[m][half] = sees[m][half] && arrays.added(row, key) != -ptx::infinity();
                }
            }
        }
#pragma unroll
        for (int n = 0; n < T::kValueTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = 8 * n + 2 * (lane & 3) + (e & 1);
                const float x =
                    tile::shared_element<T::kPv>(value + ValueTile::element_offset(k, column));
                // A narrow format's Inf is one as a float, and only that is asked here.
                if (quant::is_nonfinite_operand<Format::tf32>(ptx::float_bits(x))) {
                    float added = x;
                    if constexpr (!is_narrow(T::kPv)) {
                        added += x > 0.0f ? ptx::infinity() : -ptx::infinity();
                    }
#pragma unroll
                    for (int m = 0; m < T::kRowTiles; ++m) {
                        out[m][n][e] += sees[m][e / 2] ? added : 0.0f;
                    }
                }
            }
        }
    }
    ptx::block_sync();  // every warp has read the tile before its NaNs go
    zero_nonfinite<ValueTile, T::kPv, T::kThreads>(value);
    ptx::block_sync();  // and they are gone before any warp multiplies
}

}  // namespace adaattn::mask
