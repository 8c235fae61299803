// scale_tile.cuh -- where the scales of quantised keys and values lie.
// SPDX-License-Identifier: Apache-2.0
//
// 256 keys of a head make a tile. Its record: the steps of the keys of the first 64, those of lane
// 0 .. 3 of a quad (keys j with j % 8 / 2 the lane), the same of the second 64 and so on, the step of
// the values, and padding to whole 16-byte copies. The twin of the grouping is
// adaattn_core.formats.SCALE_BLOCKS["tile"].
#pragma once

#include "adaattn/common/types.cuh"

namespace adaattn {

constexpr int kTileKeys = 256;
constexpr int kScaleKeys = 64;   // keys among which each lane of a quad has one scale
constexpr int kTileScales = 20;  // floats of a record
constexpr int kValueScale = 16;

// Index of the record of the tile that holds row `place` of a head's codes.
ADAATTN_DEVICE i64 tile_scale_index(int heads_kv, int rows_kv, int batch, int head, int place) {
    const i64 tiles = rows_kv / kTileKeys;
    return ((static_cast<i64>(batch) * heads_kv + head) * tiles + place / kTileKeys) * kTileScales;
}

}  // namespace adaattn
