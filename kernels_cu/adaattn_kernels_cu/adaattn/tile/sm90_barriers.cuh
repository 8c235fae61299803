// sm90_barriers.cuh -- the barriers between the copying thread and the consumers of an sm90 kernel.
// SPDX-License-Identifier: Apache-2.0
//
// T is the kernel's Traits: kQueryStages, kStages, kRecordSlots and kConsumers are looked at.
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/ptx/mbarrier.cuh"

namespace adaattn::tile {

// Addresses of the barriers. `full`: one arrival, by the producer, plus the copy engine's bytes;
// consumers wait. `empty`: one lane of each consumer warp arrives once the warp's last read is
// done; the producer waits, else it would overwrite what is being read.
template <class T>
struct Barriers {
    u32 base;
    ADAATTN_DEVICE u32 query_full(int stage) const { return base + 8 * stage; }
    ADAATTN_DEVICE u32 query_empty(int stage) const { return query_full(T::kQueryStages + stage); }
    ADAATTN_DEVICE u32 key_full(int stage) const { return query_full(2 * T::kQueryStages + stage); }
    ADAATTN_DEVICE u32 key_empty(int stage) const { return key_full(T::kStages + stage); }
    ADAATTN_DEVICE u32 value_full(int stage) const { return key_full(2 * T::kStages + stage); }
    ADAATTN_DEVICE u32 value_empty(int stage) const { return key_full(3 * T::kStages + stage); }
    ADAATTN_DEVICE u32 record_full(int slot) const { return key_full(4 * T::kStages + slot); }
    // Every consumer thread arrives: each reads the record for itself, so no lane can speak for its
    // warp.
    ADAATTN_DEVICE u32 record_empty(int slot) const { return record_full(T::kRecordSlots + slot); }

    ADAATTN_DEVICE void init() const {
        for (int stage = 0; stage < T::kQueryStages; ++stage) {
            ptx::mbarrier_init(query_full(stage), 1);
            ptx::mbarrier_init(query_empty(stage), 4 * T::kConsumers);
        }
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::mbarrier_init(key_full(stage), 1);
            ptx::mbarrier_init(key_empty(stage), 4 * T::kConsumers);
            ptx::mbarrier_init(value_full(stage), 1);
            ptx::mbarrier_init(value_empty(stage), 4 * T::kConsumers);
        }
        for (int slot = 0; slot < T::kRecordSlots; ++slot) {
            ptx::mbarrier_init(record_full(slot), 1);
            ptx::mbarrier_init(record_empty(slot), kWarpgroupThreads * T::kConsumers);
        }
        ptx::mbarrier_init_fence();
    }
};

}  // namespace adaattn::tile
