// units.cuh -- work items of the sm80 family, made from a short list in the kernel's parameters.
// SPDX-License-Identifier: Apache-2.0
//
// A unit is one sequence (all its heads), or one head of one sequence; rows and keys of a packed
// (ragged) array begin at q_start and kv_start of the batch entry. Units travel in the parameters:
// no memory to allocate, to fill in time, or to free too early. A longer list takes several
// launches.
#pragma once

#include "adaattn/work/work_item.cuh"

namespace adaattn::work {

struct Unit {
    i32 batch, head, q_start, len_q, kv_start, len_kv;
};

constexpr int kMaxUnits = 128;

struct UnitList {
    i32 batch, len_q, len_kv;  // of the arrays: what there is where unit_count is 0
    i32 left, right;           // a row at position p sees keys p - left .. p + right, at most
                               //   kUnlimited each
    i32 bottom_right;          // 1: position = row + len_kv - len_q, 0: position = row
    i32 group_size;            // query heads that share a key head
    i32 tiles;                 // query tiles of the longest unit
    i32 heads_per_unit;        // heads_q, or 1 where every unit names its head
    i32 unit_count;            // 0: every batch entry, whole
    Unit units[kMaxUnits];
};

struct UnitWork {
    WorkItem item;
    Source source;
};

// Work of block `block`. Heads run fastest (neighbours share keys in L2) and the last query tile
// comes first: under a causal mask it is the longest. Beyond a shorter unit's end there are no
// rows (at most 0).
template <int kTileM>
ADAATTN_DEVICE UnitWork work_of_block(const UnitList& list, int block) {
    const int units = list.unit_count > 0 ? list.unit_count : list.batch;
    const int rest = block / list.heads_per_unit;
    const int index = rest % units;
    const int row = (list.tiles - 1 - rest / units) * kTileM;  // within the sequence
    Unit unit = {index, 0, 0, list.len_q, 0, list.len_kv};
    if (list.unit_count > 0) unit = list.units[index];
    const int head = unit.head + block % list.heads_per_unit;
    const int position = row + (list.bottom_right ? unit.len_kv - unit.len_q : 0);

    UnitWork work = {};
    work.item.batch = unit.batch;
    work.item.head = head;
    work.item.row_first = unit.q_start + row;
    work.item.rows = smaller(unit.len_q - row, kTileM);
    work.item.sources = 1;
    work.item.partial = kNoPartial;
    work.item.key_stop = unit.len_kv;
    work.item.start_offset = position - list.left;
    work.item.stop_offset = position + list.right + 1;
    work.item.heads = 1;
    work.source.batch = unit.batch;
    work.source.head = head / list.group_size;
    work.source.first_key = unit.kv_start;
    work.source.keys = unit.len_kv;
    work.source.mask = kMaskInterval;
    work.source.first_bias = kNoBias;
    return work;
}

}  // namespace adaattn::work
