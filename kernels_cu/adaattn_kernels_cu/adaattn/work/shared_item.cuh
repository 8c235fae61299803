// shared_item.cuh -- a work item at rest in shared memory, for kernels short of registers.
// SPDX-License-Identifier: Apache-2.0
//
// 32 bytes: the output tile and the interval; what a kernel knows at compile time is left out.
#pragma once

#include "adaattn/ptx/sm80.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::work {

constexpr int kSharedItemBytes = 32;

ADAATTN_DEVICE void store_item(u32 address, const WorkItem& item) {
    const u32 tile[4] = {static_cast<u32>(item.batch), static_cast<u32>(item.head),
                         static_cast<u32>(item.row_first), static_cast<u32>(item.rows)};
    const u32 interval[4] = {static_cast<u32>(item.key_start), static_cast<u32>(item.key_stop),
                             static_cast<u32>(item.start_offset),
                             static_cast<u32>(item.stop_offset)};
    ptx::store_shared_128(address, tile);
    ptx::store_shared_128(address + 16, interval);
}

// An item of which batch, head, row_first, rows and the interval are set.
ADAATTN_DEVICE WorkItem load_item(u32 address) {
    u32 tile[4], interval[4];
    ptx::load_shared_128(tile, address);
    ptx::load_shared_128(interval, address + 16);
    WorkItem item = {};
    item.batch = static_cast<int>(tile[0]);
    item.head = static_cast<int>(tile[1]);
    item.row_first = static_cast<int>(tile[2]);
    item.rows = static_cast<int>(tile[3]);
    item.key_start = static_cast<int>(interval[0]);
    item.key_stop = static_cast<int>(interval[1]);
    item.start_offset = static_cast<int>(interval[2]);
    item.stop_offset = static_cast<int>(interval[3]);
    return item;
}

}  // namespace adaattn::work
