// sm90_bwd_tiles.cuh -- one specialisation of Hopper's backward kernel, and its shared memory.
// SPDX-License-Identifier: Apache-2.0
//
// The tables in sm90_attn_bwd_f16.cuh say what the parts hold.
#pragma once

#include "adaattn/attn/sm90_bwd_producer.cuh"
#include "adaattn/common/format.cuh"
#include "adaattn/ptx/sm90.cuh"
#include "adaattn/ptx/wgmma.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

template <Format kFormatT, int kDimQkT, int kDimVT, int kTileMT, int kInOrderT>
struct Tiles {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDimQk = kDimQkT, kDimV = kDimVT;  // 64 or 128: the arrays' dims padded
    static constexpr int kTileM = kTileMT, kTileN = 128;
    static constexpr bool kInOrder = kInOrderT != 0;  // additions of dq in one order
    static constexpr int kSlabs = kTileM / 64;        // of 64 queries
    static constexpr int kConsumers = 2, kStages = 2, kSumStages = 2;
    static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

    static constexpr int kPanelsQk = kDimQk / ptx::kPanelColumns;
    static constexpr int kPanelsV = kDimV / ptx::kPanelColumns;
    static constexpr int kKeyBytes = kTileN * kDimQk * 2, kValueBytes = kTileN * kDimV * 2;
    static constexpr int kQueryBytes = kTileM * kDimQk * 2, kGradBytes = kTileM * kDimV * 2;
    static constexpr int kDsBytes = kTileM * kTileN * 2;
    static constexpr int kHalf = kDimQk / 2;  // columns of dq that a warpgroup computes
    static constexpr int kDqBytes = kTileM * kHalf * 4;
    static constexpr int kRowBytes = 2 * kTileM * 4;

    static constexpr int kValueAt = kKeyBytes;
    static constexpr int kQueryAt = kValueAt + kValueBytes;
    static constexpr int kGradAt = kQueryAt + kStages * kQueryBytes;
    static constexpr int kDsAt = kGradAt + kStages * kGradBytes;
    static constexpr int kDqAt = kDsAt + 2 * kDsBytes;
    static constexpr int kRowAt = kDqAt + kConsumers * kSumStages * kDqBytes;
    static constexpr int kBarrierAt = kRowAt + kStages * kRowBytes;
    static constexpr int kWorkAt = round_up(kBarrierAt + 8 * (1 + 8 * kStages), 16);
    static constexpr int kSmemBytes = round_up(kWorkAt + static_cast<int>(sizeof(KeyWork)), 128);

    static_assert(kSmemBytes <= 232448, "shared memory of one block on sm_90");
};

// What a thread needs of a tile's lse, asked for before it is used where registers allow it; else
// read at its place.
template <class T>
struct EarlyRows {
    static constexpr bool kEarly = T::kSlabs == 1;
    float words[kEarly ? T::kTileM / 8 : 1][2];

    ADAATTN_DEVICE void ask(u32 rows) {
        if constexpr (kEarly) {
#pragma unroll
            for (int block = 0; block < T::kTileM / 8; ++block) {
                ptx::load_shared_f32x2(words[block], rows + 32 * block);
            }
        }
    }
    ADAATTN_DEVICE void of_block(float (&pair)[2], u32 rows, int block) const {
        if constexpr (kEarly) {
            pair[0] = words[block][0];
            pair[1] = words[block][1];
        } else {
            ptx::load_shared_f32x2(pair, rows + 32 * block);
        }
    }
};

}  // namespace adaattn::sm90_attn_bwd_f16
