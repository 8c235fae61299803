// sm90_skip.cuh -- score-then-skip: an sm90 consumer passes over tiles that weigh too little.
// SPDX-License-Identifier: Apache-2.0
//
// T is the kernel's Traits, Consumer its consumer. For items with a least weight (skip_log2); the
// rule is theorem 4 of docs/math/04-dropped-mass.md. Nothing on the host offers it: it does not pay
// (docs/kernels/sm90_attn_fwd_f16.md).
#pragma once

#include "adaattn/common/types.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/warpgroup.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/softmax/online.cuh"
#include "adaattn/work/work_item.cuh"

namespace adaattn::sm90_attn_fwd_f16 {

enum NamedBarrier : u32 {
    kTurnOfFirstConsumer = 1,
    kVoteOfFirstConsumer = 5
};  // 0 is __syncthreads; one id per consumer warpgroup from here on

// Whether the tile's values count: alike for the whole warpgroup, which multiplies together.
template <class Consumer, int kScores>
ADAATTN_DEVICE bool vote(Consumer& consumer, const float (&scores)[kScores]) {
    const float skip_log2 = consumer.cursor.item().skip_log2;
    if (skip_log2 == 0.0f) return true;
    const bool mine = consumer.state.matters(scores, consumer.params.scale_log2, skip_log2);
    const bool kept =
        ptx::named_barrier_any(kVoteOfFirstConsumer + consumer.warpgroup, kWarpgroupThreads, mine);
    if (!kept) consumer.skipped_keys += smaller(consumer.cursor.keys_left(), 2 * kScores);
    return ptx::warp_uniform(kept) != 0;
}

// From a tile that was skipped on to the next one that counts, with the scores' products alone;
// where the item ends first, weights of 0 stand for its last tile. Nothing else is in flight.
template <class T, class Consumer>
ADAATTN_DEVICE void scan(Consumer& consumer, float (&acc)[T::kDimV / 2],
                         float (&scores)[T::kTileN / 2], float (&factor)[2]) {
    bool kept = false;
#pragma unroll 1
    while (!kept && !consumer.cursor.at_last()) {
        const int stage = Consumer::TileRing::index(consumer.tiles - 1);
        ptx::mbarrier_wait(consumer.barriers.value_full(stage),
                           Consumer::TileRing::parity(consumer.tiles - 1));
        consumer.release(consumer.barriers.value_empty(stage));
        consumer.cursor.next(consumer.params.sources);
        consumer.start_scores(scores);
        consumer.pass_turn();
        ptx::wgmma_wait<0>();
        consumer.finish_scores(scores);
        consumer.hide(scores);
        kept = vote(consumer, scores);
    }
    if (!kept) {
        softmax::clear(scores);
    } else if (consumer.state.exponentiate(scores, consumer.params.scale_log2,
                                           consumer.params.slack, false, factor)) {
        softmax::rescale_rows(acc, factor);
    }
}

template <class Consumer>
ADAATTN_DEVICE void count_skipped(const Consumer& consumer) {
    if (consumer.skipped_keys == 0 || threadIdx.x % kWarpgroupThreads != 0) return;
    const work::WorkItem& item = consumer.cursor.item();
    const int rows = smaller(larger(item.rows - 64 * consumer.warpgroup, 0), 64);
    if (rows == 0) return;
    const i64 head = (static_cast<i64>(item.batch) * consumer.params.squares_batch +
                      static_cast<i64>(item.head) * consumer.params.squares_head) /
                     consumer.params.squares_head;
    atomicAdd(consumer.params.skipped + head,
              static_cast<u64>(rows) * static_cast<u64>(consumer.skipped_keys));
    atomicMax(consumer.params.skipped_most + head, static_cast<u32>(consumer.skipped_keys));
}

}  // namespace adaattn::sm90_attn_fwd_f16
