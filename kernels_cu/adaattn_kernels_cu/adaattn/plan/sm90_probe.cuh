// sm90_probe.cuh -- exact scores of sampled query rows on Hopper's matrix unit: their lse, then the mass of every far key.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block takes `split_keys` keys of one group of query tiles and kHeads query heads of one key head.
//              1. s = k q^T: rows are keys, columns the sampled queries of the heads, so sums over queries stay in a thread. Heads go one
//                 after the other; the next one's product is computed under the exponentials.
//              kPass 0 (lse):  2. per column the running reference and sum of 2^(c s - c r), over the keys that the row sees;
//                              3. partial (c r, sum) of every split; the last block of a group merges them, in order of splits (sm90_probe_merge.cuh);
//                              4. with kStats: entropy, largest weight and largest score of every column.
//              kPass 1 (mass): 2. m_j = sum over a head's columns of 2^(c s - lse), over rows for which key j is far;
//                              3. one byte per key and head: the mass on a logarithmic scale (far_field.cuh).
// Numerics     q, k: bf16 or f16; s, sums: f32 (wgmma); ex2.approx, lg2.approx. A code is off by at most one step of 2^(1/8).
// Tiles        128 keys x kColumns columns a step: two warpgroups of 64 keys, m64nNk16, both operands shared; thread 0 starts copies.
// Shared mem   | name    | type   | shape                               | swizzle | live               |
//              | samples | 16 bit | dim_qk / 64 x kColumns x 64         | 128 B   | whole block        |
//              | keys    | 16 bit | kStages x dim_qk / 64 x 128 x 64    | 128 B   | copied .. scores   |
//              | limits  | i32    | kColumns x 2; f32 kColumns          | none    | whole block        |
//              | merge   | f32    | 8 warps x kColumns x 3              | none    | after the last key |
//              Nothing is aliased.
// Registers    Three heads: 165 with statistics, 127 without (two blocks on a multiprocessor), 76 for the mass (three).
// Budget: registers<=255 spill_bytes=0 smem_bytes<=232448
// Barriers     | name             | kind     | arrivals      | producer -> consumer   | phase          |
//              | key full / empty | mbarrier | 1 + bytes / 8 | copy engine <-> warps  | count / stages |
// Limits       dim_qk a multiple of 8 up to 256, padded by zeros; columns 32, 64, 96 or 128.
// Ladder       docs/kernels/sm90_probe.md.
#pragma once

#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/sm90_probe_merge.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/ptx/wgmma_f16.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::sm90_probe {

struct Params {
    ptx::TensorMap key_map;  // box: 128 rows x 64 columns
    far::Sizes sizes;
    far::Rows query;
    const far::Group* groups;
    const i32* sample_rows;  // (groups, samples)
    const i32* group_list;   // groups to probe
    const i32* decision;  // (batch, heads_q): heads below 0 are passed over; null: all are probed
    float2* partial;      // (units, groups, splits, columns): c r and sum
    float* partial_weighted;  // the same shape: sum of 2^(c s - c r) c s
    float* lse_log2;          // (units, groups, columns)
    float4*
        stats;  // (units, groups, columns): entropy in bits, largest weight, largest score in bits, 0
    i32* finished;         // (units, groups): blocks done; 0 between launches
    unsigned char* codes;  // (batch, heads_q, groups, code_stride)
    i32 listed;            // groups in the list
    i32 padding;
};

template <Format kFormatT, int kDimQkT, int kSamplesT, int kHeadsT, int kPassT, int kStatsT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kDimQk = kDimQkT;
    static constexpr int kSamples = kSamplesT;
    static constexpr int kHeads = kHeadsT;
    static constexpr int kColumns = kSamples * kHeads;
    static constexpr int kOwnScores = kSamples / 2;  // of a head and tile, in a thread
    static constexpr int kPass = kPassT;
    static constexpr bool kStats = kStatsT != 0;
    static constexpr int kTileKeys = 128;
    // The mass pass has the registers for three blocks on a multiprocessor, and so few buffers.
    static constexpr int kStages = kDimQk > 64 ? 2 : kPass == 0 ? 4 : 3;
    static constexpr int kConsumerWarps = 8;
    static constexpr int kAhead =
        kStages > 2 ? 2 : 1;  // copies in flight; the spare buffer lets warps drift apart
    static constexpr int kThreads = kConsumerWarps * kWarpThreads;
    static constexpr int kPanels = kDimQk / ptx::kPanelColumns;
    static constexpr int kSampleBytes = round_up(kPanels * kColumns * ptx::kPanelRowBytes, 1024);
    static constexpr int kKeyBytes = kPanels * kTileKeys * ptx::kPanelRowBytes;
    static constexpr int kKeyOffset = kSampleBytes;
    static constexpr int kBarrierOffset = kKeyOffset + kStages * kKeyBytes;
    static constexpr int kLimitOffset = kBarrierOffset + round_up(16 * kStages, 128);
    static constexpr int kMergeOffset = kLimitOffset + 3 * 4 * kColumns;
    static constexpr int kMergeFloats = kPass == 0 ? (kStats ? 3 : 2) : 0;
    static constexpr int kSmemBytes =
        round_up(kMergeOffset + 4 * kConsumerWarps * kColumns * kMergeFloats + 16, 128);
    static_assert(kColumns % 32 == 0 && kColumns <= 128, "columns of one wgmma");
};

template <class T>
struct Block {
    const Params& params;
    const u32 smem;
    char* const shared;
    int unit;  // (batch, key head, chunk of heads)
    int batch;
    int head_kv;
    int head_first;  // first query head
    int group;
    int split;
    int key_first;
    int tiles;  // key tiles of this block

    ADAATTN_DEVICE u32 full(int stage) const { return smem + T::kBarrierOffset + 8 * stage; }
    ADAATTN_DEVICE u32 empty(int stage) const { return full(T::kStages + stage); }
    ADAATTN_DEVICE int* stops() const { return reinterpret_cast<int*>(shared + T::kLimitOffset); }
    ADAATTN_DEVICE float* lse() const { return reinterpret_cast<float*>(stops() + T::kColumns); }
    ADAATTN_DEVICE float* merge_space() const {
        return reinterpret_cast<float*>(shared + T::kMergeOffset);
    }
    ADAATTN_DEVICE i64 group_index() const {
        return static_cast<i64>(unit) * params.sizes.groups + group;
    }

    // Works out what this block does; false if there is nothing to do.
    ADAATTN_DEVICE bool open() {
        const far::Sizes& sizes = params.sizes;
        const int chunks = sizes.heads_q / sizes.heads_kv / T::kHeads;
        split = static_cast<int>(blockIdx.x % sizes.splits);
        const int rest = static_cast<int>(blockIdx.x / sizes.splits);
        group = params.group_list[rest % params.listed];
        unit = rest / params.listed;
        const int chunk = unit % chunks;
        head_kv = unit / chunks % sizes.heads_kv;
        batch = unit / chunks / sizes.heads_kv;
        head_first = (head_kv * chunks + chunk) * T::kHeads;
        const far::Group& own = params.groups[group];
        if (own.far_keys == 0) return false;
        if (params.decision != nullptr) {
            bool wanted = false;
            for (int h = 0; h < T::kHeads; ++h)
                wanted |= params.decision[batch * sizes.heads_q + head_first + h] >= 0;
            if (!wanted) return false;
        }
        const int last_row = smaller((own.tile_first + own.tiles) * sizes.tile, sizes.len_q) - 1;
        const int stop = T::kPass == 0 ? sizes.visible(last_row) : own.far_keys;
        key_first = split * sizes.split_keys;
        const int keys = smaller(stop - key_first, sizes.split_keys);
        tiles = keys > 0 ? ceil_div(keys, T::kTileKeys) : 0;
        return true;
    }

    // Copies the sampled rows of every head to shared memory, as panels of 64 columns, and their limits.
    ADAATTN_DEVICE void load_samples() const {
        const far::Sizes& sizes = params.sizes;
        const int* rows = params.sample_rows + group * T::kSamples;
        constexpr int kChunks = T::kDimQk / 8;
        for (int i = static_cast<int>(threadIdx.x); i < T::kColumns * kChunks; i += T::kThreads) {
            const int column = i / kChunks;
            const int chunk = i % kChunks;
            uint4 words = make_uint4(0, 0, 0, 0);
            if (8 * chunk < sizes.dim_qk) {
                const u16* row = params.query.at(batch, head_first + column / T::kSamples,
                                                 rows[column % T::kSamples]);
                words = *reinterpret_cast<const uint4*>(row + 8 * chunk);
            }
            const int panel = chunk / 8;
            const int place = panel * T::kColumns * ptx::kPanelRowBytes +
                              column * ptx::kPanelRowBytes + ((chunk % 8) ^ (column % 8)) * 16;
            *reinterpret_cast<uint4*>(shared + place) = words;
        }
        for (int column = static_cast<int>(threadIdx.x); column < T::kColumns;
             column += T::kThreads) {
            const int row = rows[column % T::kSamples];
            stops()[column] =
                T::kPass == 0 ? sizes.visible(row) : sizes.near_first(row / sizes.tile);
            if constexpr (T::kPass == 1)
                lse()[column] = params.lse_log2[group_index() * T::kColumns + column];
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Starts the copy of a tile once every warp is done with what its buffer held.
    ADAATTN_DEVICE void start_copy(int tile) const {
        if (tile >= tiles || threadIdx.x != 0) return;
        const int stage = tile % T::kStages;
        ptx::mbarrier_wait(empty(stage), (static_cast<u32>(tile / T::kStages) & 1u) ^ 1u);
        ptx::mbarrier_arrive_expect(full(stage), T::kKeyBytes);
        for (int panel = 0; panel < T::kPanels; ++panel) {
            ptx::tma_load(smem + T::kKeyOffset + stage * T::kKeyBytes +
                              panel * T::kTileKeys * ptx::kPanelRowBytes,
                          &params.key_map, full(stage), ptx::kEvictLast, panel * ptx::kPanelColumns,
                          key_first + tile * T::kTileKeys, head_kv, batch);
        }
    }
    ADAATTN_DEVICE void start_first_copies() const {
        for (int tile = 0; tile < T::kAhead; ++tile) start_copy(tile);
    }

    // One head's scores with a tile of keys, started.
    ADAATTN_DEVICE void start_scores(int stage, int head, float (&scores)[T::kOwnScores]) const {
        const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
        const u64 keys = ptx::matrix_descriptor(
            smem + T::kKeyOffset + stage * T::kKeyBytes + warpgroup * 64 * ptx::kPanelRowBytes, 0);
        const u64 samples =
            ptx::matrix_descriptor(smem + head * T::kSamples * ptx::kPanelRowBytes, 0);
        ptx::pin(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kDimQk / 16; ++k) {
            ptx::Wgmma<T::kFormat, T::kSamples>::ss(
                scores, ptx::advance(keys, ptx::k_slice_bytes(k, T::kTileKeys)),
                ptx::advance(samples, ptx::k_slice_bytes(k, T::kColumns)), k != 0);
        }
        ptx::wgmma_commit();
    }

    // Calls `take(head, scores)` for every head's scores with a tile; the next head's are computed meanwhile.
    template <class Take>
    ADAATTN_DEVICE void for_scores(int tile, const Take& take) const {
        start_copy(tile + T::kAhead);
        const int stage = tile % T::kStages;
        ptx::mbarrier_wait(full(stage), static_cast<u32>(tile / T::kStages) & 1u);
        float scores[T::kHeads > 1 ? 2 : 1][T::kOwnScores];
        start_scores(stage, 0, scores[0]);
#pragma unroll
        for (int h = 0; h < T::kHeads; ++h) {
            if (h + 1 < T::kHeads) {
                start_scores(stage, h + 1, scores[(h + 1) % 2]);
                ptx::wgmma_wait<1>();
            } else {
                ptx::wgmma_wait<0>();
                if (threadIdx.x % kWarpThreads == 0) ptx::mbarrier_arrive(empty(stage));
            }
            ptx::pin(scores[h % 2]);
            take(h, scores[h % 2]);
        }
    }

    // First of this thread's two keys within a tile; the other is 8 further on.
    ADAATTN_DEVICE int own_key() const {
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        return warp * 16 + lane / 4;
    }

    // Hides keys at or beyond a sample's limit, which is alike for every head. Call only where some limit lies inside the tile.
    ADAATTN_DEVICE void hide(float (&scores)[T::kOwnScores], int key) const {
        const int column = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
        for (int j = 0; j < T::kSamples / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int stop = stops()[8 * j + column + e];
                if (key >= stop) scores[4 * j + e] = -ptx::infinity();
                if (key + 8 >= stop) scores[4 * j + 2 + e] = -ptx::infinity();
            }
        }
    }

    // The smallest limit of any column: samples are in ascending order, alike for every head.
    ADAATTN_DEVICE int first_stop() const { return stops()[0]; }

    ADAATTN_DEVICE void run_lse() const {
        constexpr int kOwn = T::kColumns / 4;
        const float c = params.sizes.scale_log2;
        float reference[kOwn];
        float sum[kOwn];
        float weighted[T::kStats ? kOwn : 1];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            reference[i] = -ptx::infinity();
            sum[i] = 0.0f;
            if constexpr (T::kStats) weighted[i] = 0.0f;
        }
        constexpr float kSlack =
            T::kStats ? 0.0f : 8.0f;  // without slack the reference is the largest score
        constexpr int kHeadOwn = T::kSamples / 4;
        for (int tile = 0; tile < tiles; ++tile) {
            const int tile_first = key_first + tile * T::kTileKeys;
            const bool cut = tile_first + T::kTileKeys > first_stop();
            for_scores(tile, [&](int h, float (&scores)[T::kOwnScores]) {
                if (cut) hide(scores, tile_first + own_key());
                bool grown = false;
#pragma unroll
                for (int i = 0; i < T::kOwnScores; ++i) scores[i] *= c;
#pragma unroll
                for (int i = 0; i < kHeadOwn; ++i) {
                    const int at = 4 * (i / 2) + i % 2;
                    const float high = fmaxf(scores[at], scores[at + 2]);
                    grown |= high > reference[h * kHeadOwn + i] + kSlack;
                }
                if (__any_sync(kFullWarp, grown)) {
#pragma unroll
                    for (int i = 0; i < kHeadOwn; ++i) {
                        const int at = 4 * (i / 2) + i % 2;
                        const int own = h * kHeadOwn + i;
                        const float next = fmaxf(reference[own], fmaxf(scores[at], scores[at + 2]));
                        const float factor =
                            next == reference[own] ? 1.0f : ptx::exp2_approx(reference[own] - next);
                        reference[own] = next;
                        sum[own] *= factor;
                        if constexpr (T::kStats) weighted[own] *= factor;
                    }
                }
#pragma unroll
                for (int i = 0; i < kHeadOwn; ++i) {
                    const int at = 4 * (i / 2) + i % 2;
                    const int own = h * kHeadOwn + i;
                    const float shift = reference[own] == -ptx::infinity() ? 0.0f : reference[own];
                    const float first = ptx::exp2_approx(scores[at] - shift);
                    const float second = ptx::exp2_approx(scores[at + 2] - shift);
                    sum[own] += first + second;
                    if constexpr (T::kStats) {
                        // A hidden score is -inf and weighs nothing: keep 0 * inf out of the sum.
                        weighted[own] += (first > 0.0f ? first * scores[at] : 0.0f) +
                                         (second > 0.0f ? second * scores[at + 2] : 0.0f);
                    }
                }
            });
        }
        // Lanes of one column differ in bits 2..4; then the eight warps meet in shared memory.
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
        float* space = merge_space();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            float w = 0.0f;
            if constexpr (T::kStats) w = weighted[i];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                const float other = __shfl_xor_sync(kFullWarp, reference[i], step);
                const float other_sum = __shfl_xor_sync(kFullWarp, sum[i], step);
                const float other_w = T::kStats ? __shfl_xor_sync(kFullWarp, w, step) : 0.0f;
                merge(reference[i], sum[i], w, other, other_sum, other_w);
            }
            const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
            if (lane < 4) {
                float* own = space + (warp * T::kColumns + column) * T::kMergeFloats;
                own[0] = reference[i];
                own[1] = sum[i];
                if constexpr (T::kStats) own[2] = w;
            }
        }
    }

    ADAATTN_DEVICE void run_mass() const {
        const far::Sizes& sizes = params.sizes;
        const float c = sizes.scale_log2;
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const int far_keys = params.groups[group].far_keys;
        for (int tile = 0; tile < tiles; ++tile) {
            const int tile_first = key_first + tile * T::kTileKeys;
            const int key = tile_first + own_key();
            const bool cut = tile_first + T::kTileKeys > first_stop();
            for_scores(tile, [&](int h, float (&scores)[T::kOwnScores]) {
                if (cut) hide(scores, key);
                // Log2 of the weights; where none of a warp's could leave code 0, no exponential is taken.
                float highest = -ptx::infinity();
#pragma unroll
                for (int i = 0; i < T::kSamples / 8; ++i) {
                    const float2 shift = *reinterpret_cast<const float2*>(lse() + h * T::kSamples +
                                                                          8 * i + 2 * (lane % 4));
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float& low = scores[4 * i + 2 * r];
                        float& high = scores[4 * i + 2 * r + 1];
                        low = fmaf(low, c, -shift.x);
                        high = fmaf(high, c, -shift.y);
                        highest = fmaxf(highest, fmaxf(low, high));
                    }
                }
                constexpr float kNothing =
                    far::kSmallestMassLog2 - 6.0f;  // 64 such weights make the smallest mass
                float mass[2] = {0.0f, 0.0f};
                if (__any_sync(kFullWarp, highest > kNothing)) {
#pragma unroll
                    for (int i = 0; i < T::kSamples / 8; ++i) {
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            mass[r] += ptx::exp2_approx(scores[4 * i + 2 * r]);
                            mass[r] += ptx::exp2_approx(scores[4 * i + 2 * r + 1]);
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    mass[r] += __shfl_xor_sync(kFullWarp, mass[r], 1);
                    mass[r] += __shfl_xor_sync(kFullWarp, mass[r], 2);
                    const int own = key + 8 * r;
                    if (lane % 4 == 0 && own < far_keys) {
                        const i64 row = (static_cast<i64>(batch) * sizes.heads_q + head_first + h) *
                                            sizes.groups +
                                        group;
                        params.codes[row * sizes.code_stride + own] =
                            static_cast<unsigned char>(far::code_of(mass[r]));
                    }
                }
            });
        }
    }
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    extern __shared__ __align__(1024) char smem_bytes[];
    Block<T> block{params, ptx::shared_address(smem_bytes), smem_bytes, 0, 0, 0, 0, 0, 0, 0, 0};
    if (!block.open()) return;
    if (block.tiles == 0) return;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::mbarrier_init(block.full(stage), 1);
            ptx::mbarrier_init(block.empty(stage), T::kConsumerWarps);
        }
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    block.start_first_copies();
    block.load_samples();
    __syncthreads();
    if constexpr (T::kPass == 1) {
        block.run_mass();
    } else {
        block.run_lse();
        __syncthreads();
        write_partials<T>(block);
        merge_splits<T>(block);
    }
}

}  // namespace adaattn::sm90_probe
