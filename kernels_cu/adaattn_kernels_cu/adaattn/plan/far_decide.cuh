// far_decide.cuh -- judges the ladder of landmark masses on whole tiles, and decides head by head. SPDX-License-Identifier: Apache-2.0
//
// Algorithm    One block per head and level. The judged tiles were computed exactly and, into partial slots, at every level. 1. Per
//              row: |approximate - exact|. 2. The error that all but `spare_rows` rows keep, over the rms exact row. 3. Its cost:
//              the key tiles that the level would visit, from the judged groups' counts: between them, and to none where no key
//              is far, counts are taken to grow linearly. 4. The head's last block: decide() of the decision table.
// Numerics     f32; a NaN error counts as infinite.
// Tiles        256 threads: eight lanes a row, then a thread a row.
// Shared mem   errors: f32, 2 x 128 rows; norms likewise.
// Budget: registers<=128 spill_bytes=0 smem_bytes<=8192
// Limits       dim_v a multiple of 8 up to 256; at most 2 judged tiles of 128 rows.
// Ladder       docs/kernels/far_field.md.
#pragma once

#include "adaattn/plan/decide.cuh"
#include "adaattn/plan/far_field.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::far_decide {

// What a head's decision rests on; read by the host when somebody looks.
struct Verdict {
    plan::HeadMeasures measures;
    plan::Choice choice;
};

struct Params {
    far::Sizes sizes;
    const far::Group* groups;
    const i32* judge_tiles;         // (judges)
    const i32* judge_groups;        // (judges): the groups that they are in
    const far_gather::Slot* slots;  // (batch, heads_q, judges, levels)
    const far::Selection* selections;
    const float* exact;        // (batch, heads_q, exact_stride, dim_v): the judged tiles first
    const i32* parts;          // (slots): items of each, whose results are joined
    const float* partial_out;  // (slots, kJudgeParts, tile, dim_v)
    const float* partial_lse;  // (slots, kJudgeParts, tile)
    const float4* stats;       // of the probe
    const i32* sample_rows;
    float* errors;              // (batch, heads_q, kLevelsMax + 1): of the levels, and the rms row
    i32* finished;              // (batch, heads_q): blocks done; 0 before and after
    i32* decision;              // (batch, heads_q)
    Verdict* verdicts;          // (batch, heads_q)
    plan::DecisionTable table;  // candidate k is level k
    float dense_tiles;          // key tiles of a dense head
    float near_tiles;           // key tiles of near field and pools of a head
    float far_tiles;            // query tiles that have a far field
    float
        judge_weights[far::kJudgesMax];  // of the judged groups' landmarks in the mean of far tiles
    i32 spare_rows;
    i32 chunk_heads;
    i32 exact_stride;
    float narrow_entropy;  // dense heads below it are not run in 8 bits first; 0: as the table says
};

template <Format kFormatT, int kThreadsT>
struct Traits {
    static constexpr Format kFormat = kFormatT;
    static constexpr int kThreads = kThreadsT;
    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kRows = far::kJudgesMax * 128;
    static constexpr int kSmemBytes = 0;
    static_assert(kThreads == kRows, "a thread a row");
};

// Weights of the parts of a row, which add up to 1: e^(l_p - l). Unset beyond `parts`.
ADAATTN_DEVICE void weigh(const float* lse, int stride, int parts,
                          float (&weights)[far::kJudgeParts]) {
    float top = lse[0];
    for (int part = 1; part < parts; ++part) top = fmaxf(top, lse[part * stride]);
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < far::kJudgeParts; ++part) {
        if (part == parts) break;
        weights[part] = parts == 1 ? 1.0f : expf(lse[part * stride] - top);
        total += weights[part];
    }
#pragma unroll
    for (int part = 0; part < far::kJudgeParts; ++part) {
        if (part < parts) weights[part] *= 1.0f / total;
    }
}

// Error of one level that all but `spare_rows` of the judged rows keep, and the rms exact row; unset where it is not offered.
template <class T>
ADAATTN_DEVICE void judge(const Params& params, int head, int level, float& error, float& rms) {
    __shared__ float errors[T::kRows];
    __shared__ float norms[T::kRows];
    __shared__ float found_error;
    __shared__ float found_rms;
    const far::Sizes& sizes = params.sizes;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    bool possible = true;
    for (int j = 0; j < sizes.judges; ++j)
        possible &= params.slots[(head * sizes.judges + j) * sizes.levels + level].head >= 0;
    error = ptx::infinity();
    rms = 0.0f;
    if (!possible) return;
    const int rows = sizes.judges * sizes.tile;
    // Eight lanes a row, so that a warp has the loads of many rows in flight.
#pragma unroll 4
    for (int first = 4 * warp; first < rows; first += 4 * T::kWarps) {
        const int row = first + lane / 8;
        const int j = row / sizes.tile;
        float away = 0.0f;
        float norm = 0.0f;
        if (params.judge_tiles[j] * sizes.tile + row % sizes.tile < sizes.len_q) {
            const float* exact =
                params.exact + (static_cast<i64>(head) * params.exact_stride + row) * sizes.dim_v;
            const int slot = (head * sizes.judges + j) * sizes.levels + level;
            const int parts = params.parts[slot];
            const i64 place =
                static_cast<i64>(slot) * far::kJudgeParts * sizes.tile + row % sizes.tile;
            float weights[far::kJudgeParts];
            weigh(params.partial_lse + place, sizes.tile, parts, weights);
            const float* approximate = params.partial_out + place * sizes.dim_v;
            for (int dim = 4 * (lane % 8); dim < sizes.dim_v; dim += 32) {
                const float4 truth = *reinterpret_cast<const float4*>(exact + dim);
                float4 found = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int part = 0; part < far::kJudgeParts; ++part) {
                    if (part == parts) break;
                    const float4 own = *reinterpret_cast<const float4*>(
                        approximate + static_cast<i64>(part) * sizes.tile * sizes.dim_v + dim);
                    found.x = fmaf(weights[part], own.x, found.x);
                    found.y = fmaf(weights[part], own.y, found.y);
                    found.z = fmaf(weights[part], own.z, found.z);
                    found.w = fmaf(weights[part], own.w, found.w);
                }
                const float x = found.x - truth.x;
                const float y = found.y - truth.y;
                const float z = found.z - truth.z;
                const float w = found.w - truth.w;
                away = fmaf(x, x, fmaf(y, y, fmaf(z, z, fmaf(w, w, away))));
                norm = fmaf(
                    truth.x, truth.x,
                    fmaf(truth.y, truth.y, fmaf(truth.z, truth.z, fmaf(truth.w, truth.w, norm))));
            }
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) {
            away += __shfl_xor_sync(kFullWarp, away, step);
            norm += __shfl_xor_sync(kFullWarp, norm, step);
        }
        if (lane % 8 == 0) {
            errors[row] = away == away ? away : ptx::infinity();
            norms[row] = norm;
        }
    }
    __syncthreads();
    if (thread < rows) {
        // The rank of this row's error; ties in order of rows.
        int larger_ones = 0;
#pragma unroll 8
        for (int i = 0; i < rows; ++i)
            larger_ones +=
                errors[i] > errors[thread] || (errors[i] == errors[thread] && i < thread);
        if (larger_ones == smaller(params.spare_rows, rows - 1)) found_error = errors[thread];
    }
    if (warp == 0) {
        float sum = 0.0f;
        for (int i = lane; i < rows; i += kWarpThreads) sum += norms[i];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
        if (lane == 0) found_rms = sqrtf(sum / static_cast<float>(rows));
    }
    __syncthreads();
    rms = found_rms;
    error = found_error == 0.0f ? 0.0f : sqrtf(found_error) / rms;
}

// The block that finishes last decides for the head.
template <class T>
ADAATTN_DEVICE void decide_head(const Params& params, int head) {
    const far::Sizes& sizes = params.sizes;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    __shared__ plan::HeadMeasures measures;
    const int unit = head / params.chunk_heads;
    const int columns = params.chunk_heads * sizes.samples;
    float entropy = 0.0f;
    float saturation = 0.0f;
    float top = 0.0f;
    for (int j = 0; j < sizes.judges; ++j) {
        const float4* own =
            params.stats +
            (static_cast<i64>(unit) * sizes.groups + params.judge_groups[j]) * columns +
            head % params.chunk_heads * sizes.samples;
        for (int i = lane; i < sizes.samples; i += kWarpThreads) {
            const int row = params.sample_rows[params.judge_groups[j] * sizes.samples + i];
            const float4 seen = own[i];
            entropy += seen.x / log2f(static_cast<float>(larger(sizes.visible(row), 2)));
            saturation += seen.y;
            top = fmaxf(top, fabsf(seen.z));
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        entropy += __shfl_xor_sync(kFullWarp, entropy, step);
        saturation += __shfl_xor_sync(kFullWarp, saturation, step);
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    }
    const float* errors = params.errors + head * (far::kLevelsMax + 1);
    for (int level = lane; level < plan::kMaxCandidates; level += kWarpThreads) {
        float landmarks = 0.0f;
        float error = 0.0f;
        float share = 0.0f;
        if (level < sizes.levels) {
            for (int j = 0; j < sizes.judges; ++j) {
                const i64 row = static_cast<i64>(head) * sizes.groups + params.judge_groups[j];
                landmarks +=
                    params.judge_weights[j] *
                    static_cast<float>(params.selections[row * far::kLevelsMax + level].count);
            }
            share = (params.near_tiles + params.far_tiles * landmarks * (1.0f / 128.0f)) /
                    params.dense_tiles;
            error = __ldcg(errors + level);
        }
        measures.share[level] = share;
        measures.error[level] = error;
    }
    __syncwarp();
    if (lane == 0) {
        const float count = static_cast<float>(sizes.judges * sizes.samples);
        measures.entropy_relative = fmaxf(entropy / count, 0.0f);
        measures.saturation = saturation / count;
        measures.score_max_abs = top * kLn2;
        measures.output_rms = __ldcg(errors + far::kLevelsMax);
        const plan::Choice choice = plan::decide(params.table, measures);
        const bool wide = choice.candidate < 0 && measures.entropy_relative < params.narrow_entropy;
        params.decision[head] = wide ? far::kWideLevel : choice.candidate;
        params.verdicts[head] = Verdict{measures, choice};
        params.finished[head] = 0;
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ bool last;
    const int levels = params.sizes.levels;
    const int head = static_cast<int>(blockIdx.x) / levels;
    const int level = static_cast<int>(blockIdx.x) % levels;
    float error, rms;
    judge<T>(params, head, level, error, rms);
    if (threadIdx.x == 0) {
        float* errors = params.errors + head * (far::kLevelsMax + 1);
        errors[level] = error;
        if (rms > 0.0f) errors[far::kLevelsMax] = rms;  // every level finds the same
        __threadfence();
        last = atomicAdd(params.finished + head, 1) == levels - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= kWarpThreads) return;
    __threadfence();
    decide_head<T>(params, head);
}

}  // namespace adaattn::far_decide
