// sm80_mask.cuh -- which keys a row sees, and keeping what it does not see out of its result.
#pragma once

#include "adaattn/attn/sm80_params.cuh"
#include "adaattn/attn/sm80_products.cuh"

namespace adaattn::sm80 {

constexpr float kLog2E = 1.4426950408889634f;

// Keys start <= key < stop, relative to the sequence's first key.
struct Interval {
    int start, stop;
    ADAATTN_DEVICE bool holds(int key) const { return key >= start && key < stop; }
};

ADAATTN_DEVICE int clamp(int x, int low, int high) { return x < low ? low : (x > high ? high : x); }

// The twin of adaattn_core.Mask.intervals: both ends grow with the row.
ADAATTN_DEVICE Interval visible_keys(const Params& params, const WorkItem& item, int row) {
    const int position = row + (params.bottom_right ? item.len_kv - item.len_q : 0);
    const int start = params.left >= kUnlimited ? 0 : clamp(position - params.left, 0, item.len_kv);
    const int stop =
        params.right >= kUnlimited ? item.len_kv : clamp(position + params.right + 1, 0, item.len_kv);
    return {start, stop > start ? stop : start};
}

// Boolean and additive masks of one head; rows and keys count from the item's own first ones.
struct ArrayMask {
    const unsigned char* allowed;
    const void* bias;
    i64 allowed_row, allowed_key, bias_row, bias_key;
    BiasType bias_type;

    ADAATTN_DEVICE ArrayMask(const Params& params, const WorkItem& item)
        : allowed(params.allowed),
          bias(params.bias),
          allowed_row(params.allowed_row),
          allowed_key(params.allowed_key),
          bias_row(params.bias_row),
          bias_key(params.bias_key),
          bias_type(params.bias_type) {
        const i64 batch = item.batch, head = item.head, row = item.q_start, key = item.kv_start;
        if (allowed != nullptr) {
            allowed += batch * params.allowed_batch + head * params.allowed_head +
                       row * allowed_row + key * allowed_key;
        }
        if (bias != nullptr) {
            const i64 offset = batch * params.bias_batch + head * params.bias_head +
                               row * bias_row + key * bias_key;
            bias = static_cast<const char*>(bias) +
                   offset * (bias_type == BiasType::kF32 ? 4 : 2);
        }
    }

    // What is added to the scaled score, in natural units; -inf masks.
    ADAATTN_DEVICE float added(int row, int key) const {
        if (allowed != nullptr && !allowed[row * allowed_row + key * allowed_key]) {
            return -infinity();
        }
        const i64 index = row * bias_row + key * bias_key;
        switch (bias_type) {
            case BiasType::kF32: return load_element<Format::f32>(bias, index);
            case BiasType::kF16: return load_element<Format::f16>(bias, index);
            case BiasType::kBf16: return load_element<Format::bf16>(bias, index);
            default: return 0.0f;
        }
    }
};

// Whether the 16-byte chunks that this thread filled hold a NaN or an Inf.
template <class TileT, Format kFormat, int kThreads>
ADAATTN_DEVICE bool holds_nonfinite(u32 tile) {
    bool found = false;
    for (int i = thread_index(); i < TileT::kRows * TileT::kChunks; i += kThreads) {
        u32 x[4];
        load_shared_128(x, tile + TileT::chunk_offset(i / TileT::kChunks, i % TileT::kChunks));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if constexpr (is_narrow(kFormat)) {
                constexpr u32 kExponent = kFormat == Format::bf16 ? 0x7f80u : 0x7c00u;
                found |= (x[e] & kExponent) == kExponent;
                found |= ((x[e] >> 16) & kExponent) == kExponent;
            } else {
                found |= (x[e] & 0x7f800000u) == 0x7f800000u;
            }
        }
    }
    return found;
}

// Zeros the NaN and Inf of a value tile; every thread of the block takes part.
template <class TileT, Format kFormat, int kThreads>
ADAATTN_DEVICE void zero_nonfinite(u32 tile) {
    for (int i = thread_index(); i < TileT::kRows * TileT::kChunks; i += kThreads) {
        u32 x[4];
        const u32 address = tile + TileT::chunk_offset(i / TileT::kChunks, i % TileT::kChunks);
        load_shared_128(x, address);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if constexpr (is_narrow(kFormat)) {
                constexpr u32 kExponent = kFormat == Format::bf16 ? 0x7f80u : 0x7c00u;
                if ((x[e] & kExponent) == kExponent) {
                    x[e] &= 0xffff0000u;
                }
                if (((x[e] >> 16) & kExponent) == kExponent) {
                    x[e] &= 0x0000ffffu;
                }
            } else if ((x[e] & 0x7f800000u) == 0x7f800000u) {
                x[e] = 0u;
            }
        }
        store_shared_128(address, x);
    }
}

// -inf for every score that the row does not see: chosen, not multiplied, so that a NaN in a key
// that is masked out is gone. With array masks the scores come back scaled (base 2).
template <class T>
ADAATTN_DEVICE void mask_scores(Scores<T>& scores, const Params& params, const WorkItem& item,
                                const ArrayMask& arrays, int first_row, int first_key) {
    const int lane = thread_index() & 31;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * m + 8 * half + lane / 4;
            const Interval visible = visible_keys(params, item, row);
            // Relative to this lane's first key, so that every comparison is with a constant.
            const int lane_key = first_key + 2 * (lane & 3);
            const Interval here = {visible.start - lane_key, visible.stop - lane_key};
#pragma unroll
            for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[m][n][2 * half + e];
                    bool sees = here.holds(8 * n + e);
                    if constexpr (T::kArrayMask) {
                        const float added = sees && row < item.len_q
                                                ? arrays.added(row, lane_key + 8 * n + e)
                                                : -infinity();
                        sees = added != -infinity();
                        score = fma_rn(score, params.scale_log2, added * kLog2E);
                    }
                    score = sees ? score : -infinity();
                }
            }
        }
    }
}

// A value that is NaN or Inf must reach the rows that see its key and no others, but 0 * NaN is
// NaN. Rare, so simple: add such values to the outputs that see them, then zero them in the tile.
template <class T>
ADAATTN_DEVICE void separate_nonfinite(Output<T>& out, u32 value, const Params& params,
                                       const WorkItem& item, const ArrayMask& arrays,
                                       int first_row, int first_key) {
    using ValueTile = typename T::ValueTile;
    const int lane = thread_index() & 31;
#pragma unroll 1
    for (int k = 0; k < T::kTileN; ++k) {
        bool sees[T::kRowTiles][2];
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * m + 8 * half + lane / 4;
                const int key = first_key + k;
                sees[m][half] =
                    row < item.len_q && visible_keys(params, item, row).holds(key);
                if constexpr (T::kArrayMask) {
                    sees[m][half] = sees[m][half] && arrays.added(row, key) != -infinity();
                }
            }
        }
#pragma unroll
        for (int n = 0; n < T::kValueTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = 8 * n + 2 * (lane & 3) + (e & 1);
                const float x = shared_element<T::kPv>(value + ValueTile::element_offset(k, column));
                if ((float_bits(x) & 0x7f800000u) == 0x7f800000u) {
#pragma unroll
                    for (int m = 0; m < T::kRowTiles; ++m) {
                        out[m][n][e] += sees[m][e / 2] ? x : 0.0f;
                    }
                }
            }
        }
    }
    block_sync();  // every warp has read the tile before its NaNs go
    zero_nonfinite<ValueTile, T::kPv, T::kThreads>(value);
    block_sync();  // and they are gone before any warp multiplies
}

}  // namespace adaattn::sm80
