// sm90_attn_bwd_f16.cuh -- gradients of exact attention, bf16 or f16, on Hopper's matrix unit.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    A block owns 128 keys with their values and walks over the tiles of queries that see
//              any of them, for every query head of their group. With c = scale log2(e), lse in
//              base 2 and delta = sum of out x grad_out (smxx_attn_bwd_rows):
//              1. s^T = k q^T and dp^T = v do^T, 64 keys x 64 queries a warpgroup.
//              2. p^T = 2^(c s^T - lse), 0 where a query does not see a key.
//              3. dv += p^T do, p from registers.
//              4. ds^T = p^T (dp^T - delta), rounded, also to shared memory.
//              5. dk += ds^T q from registers; dq = ds k, half of its columns a warpgroup.
//              6. dq is added to memory by the copy engine.
//              After the last tile: dk times the scale, dv. smxx_attn_bwd_finish turns the sums of
//              step 6 into dq.
//              Products are in flight all the time: step 2 runs under dp, step 4 under dv, and step 6
//              of the tile before under the next tile's scores; dk, and dq of the tile before, come
//              between.
//              The order of the additions in step 6 is not fixed, unless kInOrder: blocks then wait
//              for their turn at each tile of queries, the last keys first, which under a causal
//              mask is the order in which they come anyway. Source: FlashAttention-3, arXiv
//              2407.08608, appendix B, for steps 1 to 6; not their order.
// Numerics     q, k, v, do, p, ds: bf16 or f16; the rest f32. (r1) wgmma's f32 accumulation of s
//              and dp; (r2) ex2.approx, 2 ulp; (r3) p and ds to 16 bits; (r4) wgmma's accumulation
//              of dv, dk, dq; (r5) f32 additions of dq in memory; (r6) gradients to 16 bits. A
//              result that is not finite sets `broken`: sm80_attn_bwd then does the pass again.
// Tiles        Block: 128 keys x 64 queries. Warpgroup 0 gives its registers away; one thread of
//              its first warp starts the copies, its second warp brings lse and delta, each of
//              the others adds half of dq to memory. Warpgroups 1, 2: 64 keys each.
// Shared mem   | name    | type   | shape                   | live                      |
//              | keys    | 16 bit | 128 x dim_qk            | whole block               |
//              | values  | 16 bit | 128 x dim_v             | whole block               |
//              | queries | 16 bit | 2 x 64 x dim_qk         | copied .. dk              |
//              | grads   | 16 bit | 2 x 64 x dim_v          | copied .. dv              |
//              | ds      | 16 bit | 2 x 64 x 128            | step 4 .. dq              |
//              | dq      | f32    | 2 halves x 2 x 64 x     | step 6 .. read by engine  |
//              |         |        |   dim / 2               |                           |
//              | rows    | f32    | 2 x (lse, delta) x 64   | copied .. step 4          |
//              | work    | KeyWork |                        | whole block               |
//              16-bit tiles are panels of 64 columns, swizzled by 128 bytes. Nothing is aliased.
// Registers    Producer 24, consumers 240: dk and dv take (dim_qk + dim_v) / 2, s and dp 32 each.
// Budget: registers<=168 spill_bytes=0 smem_bytes<=232448
// Barriers     | name               | kind     | arrivals           | producer -> consumer       |
//              | keys full          | mbarrier | 1 + bytes          | copy engine -> consumers   |
//              | query, grad full   | mbarrier | 1 + bytes          | copy engine -> consumers   |
//              | query, grad empty  | mbarrier | 8 (warps)          | consumers -> copier        |
//              | rows full / empty  | mbarrier | 32 / 256           | second warp <-> consumers  |
//              | ds full / empty    | mbarrier | 8 (warps)          | consumers <-> consumers    |
//              | sums full / empty  | named    | 128 + 32           | a consumer <-> its adder   |
//              Every consumer thread arrives at `rows empty` for itself: what it frees is written
//              by ordinary stores, and racecheck follows reads through an mbarrier thread by
//              thread, so not through __syncwarp and the arrival of a warp's first lane. Elsewhere
//              one lane does arrive for its warp: there it is the copy engine that writes.
// Limits       dim_qk, dim_v multiples of 8 up to 128, zero-padded to 64 or 128 by the copy engine;
//              16-byte aligned rows; scale > 0; lengths up to kUnlimited. Checked by the host.
// Ladder       docs/kernels/sm90_attn_bwd_f16.md.
#pragma once

#include "adaattn/attn/sm90_bwd_epilogue.cuh"
#include "adaattn/attn/sm90_bwd_params.cuh"
#include "adaattn/attn/sm90_bwd_producer.cuh"
#include "adaattn/attn/sm90_bwd_tiles.cuh"
#include "adaattn/attn/sm90_bwd_turns.cuh"
#include "adaattn/common/format.cuh"
#include "adaattn/mask/sm90_mask.cuh"
#include "adaattn/ptx/mbarrier.cuh"
#include "adaattn/ptx/sm90.cuh"
#include "adaattn/ptx/tma.cuh"
#include "adaattn/ptx/warpgroup.cuh"
#include "adaattn/ptx/wgmma.cuh"
#include "adaattn/ptx/wgmma_f16.cuh"
#include "adaattn/softmax/online.cuh"

namespace adaattn::sm90_attn_bwd_f16 {

template <Format kFormatT, int kDimQkT, int kDimVT, int kTileMT, int kInOrderT>
struct Traits : Tiles<kFormatT, kDimQkT, kDimVT, kTileMT, kInOrderT> {};

// ---- consumer: 64 keys a warpgroup ------------------------------------------------------------

template <class T>
struct Consumer {
    const Params& params;
    const Barriers<T> barriers;
    const u32 smem;
    const int warpgroup;  // 0 or 1

    // Where it rests is known to the compiler: a reference would take a register or two.
    ADAATTN_DEVICE static const KeyWork& work() {
        extern __shared__ __align__(1024) char smem_bytes[];
        return *reinterpret_cast<const KeyWork*>(smem_bytes + T::kWorkAt);
    }
    // Unsigned as long as they are divided: shorter code.
    ADAATTN_DEVICE int lane() const { return static_cast<int>(threadIdx.x % kWarpThreads); }
    // First of this warp's 16 keys within the tile.
    ADAATTN_DEVICE int row() const {
        return 16 * static_cast<int>(threadIdx.x / kWarpThreads) - 64;
    }
    // By one lane for all: what the others have read must be behind them.
    ADAATTN_DEVICE void release(u32 empty_barrier) const {
        __syncwarp();
        if (lane() == 0) ptx::mbarrier_arrive(empty_barrier);
    }

    // acc = (64 rows of this warpgroup) x (64 streamed rows)^T, started.
    template <int kDim>
    ADAATTN_DEVICE void start_product(float (&acc)[T::kTileM / 2], u32 own, u32 streamed) const {
        u32 rows[1] = {own + warpgroup * 64 * ptx::kPanelRowBytes};
        ptx::pin(rows);  // made anew at each tile: no registers to keep descriptors in
        const u64 a = ptx::matrix_descriptor(rows[0], 0);
        const u64 b = ptx::matrix_descriptor(streamed, 0);
        ptx::pin(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
            ptx::Wgmma<T::kFormat, T::kTileM>::ss(
                acc, ptx::advance(a, ptx::k_slice_bytes(k, T::kTileN)),
                ptx::advance(b, ptx::k_slice_bytes(k, T::kTileM)), k != 0);
        }
        ptx::wgmma_commit();
    }

    // acc += weights (64 keys x 64 queries) x streamed rows, started.
    template <int kDim>
    ADAATTN_DEVICE void start_gradient(float (&acc)[kDim / 2], u32 (&weights)[T::kTileM / 4],
                                       u32 streamed) const {
        const u64 b = ptx::matrix_descriptor(streamed, T::kTileM * ptx::kPanelRowBytes);
        ptx::pin(acc);
        ptx::pin(weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kTileM / 16; ++k) {
            ptx::Wgmma<T::kFormat, kDim>::rs(acc, &weights[4 * k],
                                             ptx::advance(b, 16 * k * ptx::kPanelRowBytes), 1);
        }
        ptx::wgmma_commit();
    }

    ADAATTN_DEVICE static void pin_slabs(float (&acc)[T::kSlabs][T::kHalf / 2]) {
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab) ptx::pin(acc[slab]);
    }

    // dq = ds (queries x 128 keys) x this warpgroup's half of the keys' columns, started.
    ADAATTN_DEVICE void start_query_gradient(float (&acc)[T::kSlabs][T::kHalf / 2], u32 ds) const {
        const int column = warpgroup * T::kHalf;
        const u64 a = ptx::matrix_descriptor(ds, 0);
        const u64 b = ptx::matrix_descriptor(
            smem + column / ptx::kPanelColumns * T::kTileN * ptx::kPanelRowBytes +
                column % ptx::kPanelColumns * 2,
            T::kTileN * ptx::kPanelRowBytes);
        pin_slabs(acc);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kTileN / 16; ++k) {
#pragma unroll
            for (int slab = 0; slab < T::kSlabs; ++slab) {
                const u32 rows = slab * 64 * ptx::kPanelRowBytes;
                ptx::Wgmma<T::kFormat, T::kHalf>::ss_rows(
                    acc[slab], ptx::advance(a, ptx::k_slice_bytes(k, T::kTileM) + rows),
                    ptx::advance(b, 16 * k * ptx::kPanelRowBytes), k != 0);
            }
        }
        ptx::wgmma_commit();
    }

    // -inf where a query (column) does not see a key (row), and for rows that hold no key.
    ADAATTN_DEVICE void hide(float (&scores)[T::kTileM / 2], int first_query) const {
        const bool short_tile = work().item.rows < T::kTileN;
        if (mask::needed(work().item, work().source, first_query, T::kTileM, T::kTileM,
                         64 * warpgroup, 64 * warpgroup + 63)) {
            mask::apply(scores, work().item, work().source, first_query, T::kTileM,
                        row() + lane() / 4, lane());
        }
        if (short_tile) {
#pragma unroll
            for (int i = 0; i < T::kTileM / 2; ++i) {
                const int key = row() + lane() / 4 + 8 * (i / 2 % 2);
                if (key >= work().item.rows) scores[i] = -ptx::infinity();
            }
        }
    }

    // Rounded ds^T to shared memory as rows of queries, 64 keys of this warpgroup a panel.
    ADAATTN_DEVICE void write_ds(const u32 (&words)[T::kTileM / 4], u32 ds) const {
        const u32 panel = ds + warpgroup * T::kTileM * ptx::kPanelRowBytes;
        const int warp_chunk = (row() % 64) / 8;  // of 8 keys
        // Matrix i of a store: queries 8 (i / 2) .., keys 8 (i % 2) ..; lane l gives row l % 8 of
        // matrix l / 8.
        const int query = 8 * (lane() / 16) + lane() % 8;
        const int chunk = warp_chunk + lane() / 8 % 2;
        const u32 address =
            panel + query * ptx::kPanelRowBytes + static_cast<u32>((chunk ^ (query & 7)) << 4);
#pragma unroll
        for (int k = 0; k < T::kTileM / 16; ++k) {
            ptx::store_matrices_transposed(address + 16 * k * ptx::kPanelRowBytes, words[4 * k],
                                           words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
        }
    }

    // Writes this warpgroup's half of the dq of tile i where its adder takes it from.
    ADAATTN_DEVICE void hand_over(const float (&acc)[T::kSlabs][T::kHalf / 2], int i) const {
        const u32 number = static_cast<u32>(i), stage = number % T::kSumStages;
        const u32 staged = smem + T::kDqAt + (warpgroup * T::kSumStages + stage) * T::kDqBytes;
        ptx::named_barrier_sync(sums_empty(warpgroup, stage), kSumThreads);
        const int local = row() % 64 + lane() / 4;
        const u32 to = staged + local * (T::kHalf * 4) + lane() % 2 * 8;
        // Of the row in the array: tiles are whole eights of rows.
        const int twist = (work().source.first_key + local) & 7;
#pragma unroll
        for (int block = 0; block < T::kHalf / 8; ++block) {
            const u32 at = to + 16 * ((2 * block + lane() % 4 / 2) ^ twist);
#pragma unroll
            for (int r = 0; r < 2 * T::kSlabs; ++r) {
                ptx::store_shared_f32x2(at + (r / 2 * 64 + r % 2 * 8) * (T::kHalf * 4),
                                        acc[r / 2][4 * block + 2 * (r % 2)],
                                        acc[r / 2][4 * block + 2 * (r % 2) + 1]);
            }
        }
    }
    // Behind a fence: the sums of tile i are written.
    ADAATTN_DEVICE void announce(int i) const {
        const u32 stage = static_cast<u32>(i) % T::kSumStages;
        ptx::named_barrier_arrive(sums_full(warpgroup, stage), kSumThreads);
    }

    // p^T = 2^(c s^T - lse), rounded.
    ADAATTN_DEVICE void exponentiate(float (&scores)[T::kTileM / 2], const EarlyRows<T>& asked,
                                     u32 rows, u32 (&weights)[T::kTileM / 4]) const {
#pragma unroll
        for (int block = 0; block < T::kTileM / 8; ++block) {
            float lse[2];
            asked.of_block(lse, rows, block);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& s = scores[4 * block + e];
                s = ptx::exp2_approx(fmaf(s, params.scale_log2, -lse[e & 1]));
            }
        }
        softmax::round_pairs<T::kFormat>(scores, weights);
    }

    // ds^T = p^T (dp^T - delta), rounded; p as it was rounded, which frees the registers of the
    // other one for dq.
    ADAATTN_DEVICE static void differentiate(float (&d_scores)[T::kTileM / 2],
                                             const u32 (&weights)[T::kTileM / 4], u32 rows,
                                             u32 (&words)[T::kTileM / 4]) {
#pragma unroll
        for (int block = 0; block < T::kTileM / 8; ++block) {
            float delta[2];
            ptx::load_shared_f32x2(delta, rows + 32 * block);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const u32 pair = weights[2 * block + e / 2];
                const float weight =
                    quant::widen<T::kFormat>(static_cast<u16>(e & 1 ? pair >> 16 : pair & 0xffffu));
                float& d = d_scores[4 * block + e];
                d = weight * (d - delta[e & 1]);
            }
        }
        softmax::round_pairs<T::kFormat>(d_scores, words);
    }

    // Tile i, whose scores are there, and dq of the tile before, unless this is the first. The two
    // consumers may be most of a tile apart: each needs the other's ds only for dq, a tile later.
    template <bool kFirst>
    ADAATTN_DEVICE void step(int i, const Place& here, float (&scores)[T::kTileM / 2],
                             float (&d_key)[T::kDimQk / 2], float (&d_value)[T::kDimV / 2]) const {
        const int stage = i & 1;
        const u32 parity = static_cast<u32>(i / 2) & 1u;
        const u32 queries = smem + T::kQueryAt + stage * T::kQueryBytes;
        const u32 grads = smem + T::kGradAt + stage * T::kGradBytes;
        const u32 rows = smem + T::kRowAt + stage * T::kRowBytes + lane() % 4 * 8;
        float d_query[T::kSlabs][T::kHalf / 2];
        float d_scores[T::kTileM / 2];
        u32 weights[T::kTileM / 4];
        u32 words[T::kTileM / 4];
        EarlyRows<T> lse;

        ptx::mbarrier_wait(barriers.grad_full(stage), parity);
        start_product<T::kDimV>(d_scores, smem + T::kValueAt, grads);

        const int whole_begin = work().whole_begin, whole_end = work().whole_end;
        ptx::mbarrier_wait(barriers.rows_full(stage), parity);
        lse.ask(rows);
        if (here.tile < whole_begin || here.tile >= whole_end) hide(scores, here.tile * T::kTileM);
        exponentiate(scores, lse, rows, weights);
        ptx::pin(weights);
        start_gradient<T::kDimV>(d_value, weights, grads);
        ptx::wgmma_wait<1>();
        ptx::pin(d_scores);
        differentiate(d_scores, weights, rows + T::kTileM * 4, words);
        ptx::mbarrier_arrive(barriers.rows_empty(stage));
        ptx::mbarrier_wait(barriers.ds_empty(stage), parity ^ 1u);
        write_ds(words, smem + T::kDsAt + stage * T::kDsBytes);
        ptx::async_proxy_fence();  // of the dq handed over in the step before, too
        release(barriers.ds_full(stage));
        if (!kFirst && i > 1) announce(i - 2);

        start_gradient<T::kDimQk>(d_key, words, queries);
        ptx::wgmma_wait<1>();
        ptx::pin(d_value);
        ptx::pin(weights);
        release(barriers.grad_empty(stage));
        if constexpr (!kFirst) {
            ptx::mbarrier_wait(barriers.ds_full(stage ^ 1), static_cast<u32>((i - 1) / 2) & 1u);
            start_query_gradient(d_query, smem + T::kDsAt + (stage ^ 1) * T::kDsBytes);
        }
        start_scores(i + 1, scores);
        ptx::wgmma_wait<1>();
        ptx::pin(d_key);
        ptx::pin(words);
        release(barriers.query_empty(stage));
        if constexpr (!kFirst) {
            pin_slabs(d_query);
            release(barriers.ds_empty(stage ^ 1));
            hand_over(d_query, i - 1);
        }
        ptx::wgmma_wait<0>();
        ptx::pin(scores);
    }

    // Behind the last tile the product is of what its stage held before, and is not used.
    ADAATTN_DEVICE void start_scores(int i, float (&scores)[T::kTileM / 2]) const {
        if (i < work().count) {
            ptx::mbarrier_wait(barriers.query_full(i & 1), static_cast<u32>(i / 2) & 1u);
        }
        start_product<T::kDimQk>(scores, smem, smem + T::kQueryAt + (i & 1) * T::kQueryBytes);
    }

    ADAATTN_DEVICE void run() const {
        float d_key[T::kDimQk / 2];
        float d_value[T::kDimV / 2];
        softmax::clear(d_key);
        softmax::clear(d_value);
        if (work().count > 0) {
            float scores[T::kTileM / 2];
            ptx::mbarrier_wait(barriers.keys_full(), 0);
            start_scores(0, scores);
            ptx::wgmma_wait<0>();
            ptx::pin(scores);
            Place here = {work().begin, work().first_head};
            step<true>(0, here, scores, d_key, d_value);
#pragma unroll 1
            for (int i = 1; i < work().count; ++i) {
                here = after(work(), here);
                step<false>(i, here, scores, d_key, d_value);
            }
            const int last = work().count - 1;
            float d_query[T::kSlabs][T::kHalf / 2];
            ptx::mbarrier_wait(barriers.ds_full(last & 1), static_cast<u32>(last / 2) & 1u);
            start_query_gradient(d_query, smem + T::kDsAt + (last & 1) * T::kDsBytes);
            ptx::wgmma_wait<0>();
            pin_slabs(d_query);
            hand_over(d_query, last);
            ptx::async_proxy_fence();
            if (last > 0) announce(last - 1);
            announce(last);
        }
        write_gradient<T::kFormat, T::kDimQk>(params, params.d_key, params.dim_qk, work(), d_key,
                                              params.scale, row(), lane());
        write_gradient<T::kFormat, T::kDimV>(params, params.d_value, params.dim_v, work(), d_value,
                                             1.0f, row(), lane());
    }
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    extern __shared__ __align__(1024) char smem_bytes[];
    const u32 smem = ptx::shared_address(smem_bytes);
    const Barriers<T> barriers{smem + T::kBarrierAt};
    const int warp = ptx::warp_uniform(static_cast<int>(threadIdx.x) / kWarpThreads);
    KeyWork& work = *reinterpret_cast<KeyWork*>(smem_bytes + T::kWorkAt);

    if (threadIdx.x == 0) {
        work = key_work<T>(params, static_cast<int>(blockIdx.x));
        if (smem % ptx::kSwizzleAtomBytes != 0)
            __trap();  // the swizzle is a function of the address
        ptx::prefetch_tensor_map(&params.query_map);
        ptx::prefetch_tensor_map(&params.grad_map);
        ptx::prefetch_tensor_map(&params.key_map);
        ptx::prefetch_tensor_map(&params.value_map);
        barriers.init();
    }
    __syncthreads();
    if (work.item.rows <= 0) return;

    if (warp < 4) {
        ptx::registers_give<T::kProducerRegisters>();
        if (warp == 0 && threadIdx.x == 0) produce<T>(params, barriers, smem, work);
        if (warp == 1) bring_rows<T>(params, barriers, smem, work);
        if (warp >= 2) add_sums<T>(params, smem, work, warp - 2);
    } else {
        ptx::registers_take<T::kConsumerRegisters>();
        const Consumer<T> consumer{params, barriers, smem, warp / 4 - 1};
        consumer.run();
    }
}

}  // namespace adaattn::sm90_attn_bwd_f16
