// sm90_attn_fwd_8bit.cuh -- attention forward with operands of 8 bits, on Hopper's matrix unit.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    That of sm90_attn_fwd_f16.cuh, whose work, queues, turns and masks these are, with
//              q and k in i8 or p and v in e4m3, or both. What differs:
//              1. s = q k^T of codes, exactly, in i32. A score in units of log2 is s m,
//                 m = scale log2(e) step(row) step(64 keys' quarter): see softmax/scaled.cuh.
//              5. l sums p 2^w; e4m3 has its largest numbers used, w = log2(p_scale).
//              6. e4m3: t = p v into accumulators of its own; o <- (o + t step(tile of v)) 2^(..).
//                 What the unit loses in long sums is so bound to the keys of a tile.
//              7. lse = reference + log2 l - w, by ln 2; and scale q . c, which the scores are short
//                 of where keys were centred.
//              A consumer's products follow each other, output before scores, and run under the
//              other consumers' weights: see run().
//              Source: SageAttention2, arXiv 2411.10958; FlashAttention-3, arXiv 2407.08608.
// Numerics     Codes: quant/smxx_quantize.cuh (r1). s: exact below 2^22; (r2) m to f32; (r3)
//              ex2.approx, 2 ulp; (r4) p to e4m3 or 16 bits, in [0, p_scale]; (r5) wgmma's
//              accumulation, 13 fraction bits in e4m3, 256 keys long at most; (r6) o in f32; (r7)
//              out to 16 bits. l sums p before r4.
// Tiles        Block: 64 kConsumers queries x kTileN keys; m64nNk32 of i8 and e4m3, m64nNk16 of
//              16-bit operands.
// Shared mem   As in sm90_attn_fwd_f16.cuh, with panels of 128 columns for codes; values' panels
//              hold 128 keys of every channel; 80 bytes of scales beside each tile of keys.
// Registers    Producer 24 or 32, consumers 240 or 160 (2, 3 of them); no spill.
// Budget: registers<=168 spill_bytes=0 smem_bytes<=232448
// Barriers     Those of sm90_attn_fwd_f16.cuh; scales arrive with the keys.
// Limits       Padded dims 64 or 128; kTileN 128 or 256; sources begin on multiples of kTileN keys
//              of their sequence. All checked by the host.
// Ladder       docs/kernels/sm90_attn_fwd_8bit.md.
#pragma once

#include "adaattn/attn/sm90_attn_fwd_f16.cuh"
#include "adaattn/attn/sm90_quantised_params.cuh"
#include "adaattn/ptx/sm89.cuh"
#include "adaattn/ptx/wgmma_8bit.cuh"
#include "adaattn/quant/scale_tile.cuh"
#include "adaattn/softmax/scaled.cuh"

namespace adaattn {

// Scales of the tile of keys at a cursor. A tile that no row sees may lie outside the arrays.
template <class Cursor>
ADAATTN_DEVICE const void* scales_of(const QuantisedParams& params, const Cursor& cursor) {
    const work::Source& source = cursor.current();
    const int place = cursor.first_key() + cursor.item().code_shift;
    return params.tile_scales + tile_scale_index(params.heads_kv, params.rows_kv, source.batch,
                                                 source.head, place < params.rows_kv ? place : 0);
}

namespace sm90_attn_fwd_8bit {

using Params = QuantisedParams;

template <Format kFormatT, Format kQkT, Format kPvT, int kDimQkT, int kDimVT, int kConsumersT,
          int kTileNT, int kStagesT, int kQueryStagesT, int kPingPongT, int kRoleT,
          int kMaxSourcesT>
struct Traits {
    using Params = QuantisedParams;
    static constexpr Format kFormat = kFormatT;  // of the arrays
    static constexpr Format kQk = kQkT;          // i8, or that of the arrays
    static constexpr Format kPv = kPvT;          // e4m3, or that of the arrays
    static constexpr int kDimQk = kDimQkT;       // 64 or 128: the arrays' dims padded
    static constexpr int kDimV = kDimVT;
    static constexpr int kConsumers = kConsumersT;
    static constexpr int kTileM = 64 * kConsumers;
    static constexpr int kTileN = kTileNT;
    static constexpr int kStages = kStagesT;
    static constexpr int kQueryStages = kQueryStagesT;
    static constexpr bool kPingPong = kPingPongT != 0;
    static constexpr int kRole = kRoleT;
    static constexpr bool kSkip = false;
    static constexpr int kMaxSources = kMaxSourcesT;

    static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;

    static constexpr bool kCodesQk = is_quantised(kQk);
    static constexpr bool kCodesPv = is_quantised(kPv);
    static constexpr int kColumnsQk = ptx::kPanelRowBytes / storage_bytes(kQk);
    static constexpr int kColumnsV = kCodesPv ? ptx::kPanelRowBytes : ptx::kPanelColumns;
    static constexpr int kPanelsQk = ceil_div(kDimQk, kColumnsQk);
    static constexpr int kPanelsV = kCodesPv ? kTileN / kColumnsV : kDimV / kColumnsV;
    static constexpr int kQueryBytes = kTileM * kPanelsQk * ptx::kPanelRowBytes;
    static constexpr int kKeyBytes = kTileN * kPanelsQk * ptx::kPanelRowBytes;
    static constexpr int kValueBytes = (kCodesPv ? kDimV : kTileN) * kPanelsV * ptx::kPanelRowBytes;
    static constexpr int kScaleBytes = 4 * kTileScales;
    static constexpr int kRecordSlots = kQueryStages == 1 ? 4 : 8;
    static constexpr int kRecordBytes = static_cast<int>(sizeof(work::WorkRecord<kMaxSources>));
    static constexpr int kKeyOffset = kQueryStages * kQueryBytes;
    static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
    static constexpr int kRecordOffset = kValueOffset + kStages * kValueBytes;
    static constexpr int kBiasOffset = kRecordOffset + kRecordSlots * kRecordBytes;
    static constexpr int kBiasBytes = kStages * kScaleBytes;
    static constexpr int kBarrierOffset = kBiasOffset + kBiasBytes;
    static constexpr int kBarriers = 2 * kQueryStages + 4 * kStages + 2 * kRecordSlots;
    static constexpr int kSmemBytes = round_up(kBarrierOffset + 8 * kBarriers, 128);

    static_assert(kTileKeys % kTileN == 0, "one record of scales a tile");
    static_assert(kCodesQk || kCodesPv, "16-bit operands have a kernel of their own");
    static_assert(kRole != kExactRows, "exact rows are computed from the arrays as they are");
    static_assert(kSmemBytes <= 232448, "shared memory of one block on sm_90");
};

template <bool kCodes>
struct Raw {
    using Type = float;
};
template <>
struct Raw<true> {
    using Type = i32;
};

template <class T>
struct Consumer : sm90_attn_fwd_f16::Consumer<T> {
    using Base = sm90_attn_fwd_f16::Consumer<T>;
    using typename Base::RecordRing;
    using typename Base::TileRing;
    using RawScore = typename Raw<T::kQk == Format::i8>::Type;
    static constexpr int kScores = T::kTileN / 2;
    // Sums of codes start from this number's bits, and so are floats, 3 2^22 above their value: no
    // conversion, and below 2^22 no rounding.
    static constexpr i32 kOriginBits = 0x4b400000;
    static constexpr float kOrigin = T::kCodesQk ? 12582912.0f : 0.0f;
    static constexpr int kSpans = T::kCodesQk ? T::kTileN / kScaleKeys : 1;
    static constexpr int kWeightWords = T::kCodesPv ? T::kTileN / 8 : T::kTileN / 4;
    // e4m3's product: with three consumers all of it would not fit beside the output.
    static constexpr int kPieceColumns = T::kConsumers == 3 ? 64 : T::kDimV;
    static constexpr int kPieces = T::kCodesPv ? T::kDimV / kPieceColumns : 1;
    static constexpr int kProducts = T::kCodesPv ? kPieceColumns / 2 : 1;

    softmax::Scaled softmax;
    float zero;           // which the compiler does not know
    float row_factor[2];  // log2 units of a raw score, keys' steps aside

    ADAATTN_DEVICE const Params& quantised() const {
        return static_cast<const Params&>(this->params);
    }

    ADAATTN_DEVICE i64 row_place(int r) const {
        const work::WorkItem& item = this->record(this->items - 1).item;
        return (static_cast<i64>(item.batch) * quantised().heads_q + item.head) *
                   quantised().len_q +
               item.row_first + this->row() + this->lane() / 4 + 8 * r;
    }
    ADAATTN_DEVICE bool row_exists(int r) const {
        return this->row() + this->lane() / 4 + 8 * r < this->record(this->items - 1).item.rows;
    }

    ADAATTN_DEVICE bool open() {
        if (!this->open_item()) return false;
        softmax.reset();
        zero = quantised().zero;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            row_factor[r] = quantised().scale_log2;
            if constexpr (T::kCodesQk) {
                row_factor[r] *=
                    row_exists(r) ? __ldg(quantised().query_scales + row_place(r)) : 0.0f;
            }
        }
        return true;
    }

    // Where sums of codes start from. Multiply-adds, since a plain move takes twice the time; with a
    // factor each, since the compiler would move one's result about.
    ADAATTN_DEVICE void preset(RawScore (&raw)[kScores]) const {
        if constexpr (T::kCodesQk) {
#pragma unroll
            for (int i = 0; i < kScores; ++i) {
                raw[i] = __float_as_int(fmaf(zero, static_cast<float>(i + 2), kOrigin));
            }
        }
    }

    // Raw scores Q K^T, started.
    ADAATTN_DEVICE void start_raw(RawScore (&raw)[kScores]) const {
        preset(raw);
        const int query_stage = Base::QueryRing::index(this->items - 1);
        const int stage = TileRing::index(this->tiles);
        const u64 queries = ptx::matrix_descriptor(
            this->smem + query_stage * T::kQueryBytes + this->warpgroup * 64 * ptx::kPanelRowBytes,
            0);
        const u64 keys =
            ptx::matrix_descriptor(this->smem + T::kKeyOffset + stage * T::kKeyBytes, 0);
        ptx::mbarrier_wait(this->barriers.key_full(stage), TileRing::parity(this->tiles));
        constexpr int accumulate = T::kCodesQk ? 1 : 0;
        ptx::pin(raw);
        ptx::wgmma_fence();
        constexpr int kSlices = T::kDimQk * storage_bytes(T::kQk) / 32;
#pragma unroll
        for (int k = 0; k < kSlices; ++k) {
            ptx::Wgmma<T::kQk, T::kTileN>::ss(
                raw, ptx::advance(queries, ptx::k_slice_bytes(k, T::kTileM)),
                ptx::advance(keys, ptx::k_slice_bytes(k, T::kTileN)), k != 0 ? 1 : accumulate);
        }
        ptx::wgmma_commit();
    }

    // What turns the raw scores in flight into units of log2, and the step of the tile's values.
    ADAATTN_DEVICE void read_scales(float (&multiplier)[2][kSpans], float& value_step) const {
        u32 scales = this->smem + T::kBiasOffset + TileRing::index(this->tiles) * T::kScaleBytes;
        if constexpr (T::kCodesPv) {
            value_step = load(scales + 4 * kValueScale);
        }
        if constexpr (T::kCodesQk && T::kTileN < kTileKeys) {
            const int place = this->cursor.first_key() + this->cursor.item().code_shift;
            scales += 16 * (place % kTileKeys / kScaleKeys);
        }
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
            float step = 1.0f;
            if constexpr (T::kCodesQk) step = load(scales + 4 * (4 * span + this->lane() % 4));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                // Never 0, which would make NaN of a hidden score; NaN stays NaN.
                multiplier[r][span] =
                    T::kCodesQk ? fmaf(row_factor[r], step, 1e-37f) : row_factor[r];
            }
        }
    }

    // Call when they are there: leaves them as floats.
    ADAATTN_DEVICE void finish_raw(RawScore (&raw)[kScores], float (&scores)[kScores]) {
        ptx::pin(raw);
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            if constexpr (T::kCodesQk) {
                scores[i] = __int_as_float(raw[i]);
            } else {
                scores[i] = raw[i];
            }
        }
        this->release(this->barriers.key_empty(TileRing::index(this->tiles)));
        if (this->cursor.at_last()) {
            this->release(this->barriers.query_empty(Base::QueryRing::index(this->items - 1)));
        }
        ++this->tiles;
    }

    ADAATTN_DEVICE static float load(u32 address) {
        float x;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
        return x;
    }

    // P V of a tile, piece by piece, into the output; returns once the last piece is there.
    template <int kPiece>
    ADAATTN_DEVICE void multiply_pieces(float (&acc)[T::kDimV / 2], float (&product)[kProducts],
                                        u32 (&weights)[kWeightWords], float value_step,
                                        u64 values) const {
        ptx::pin(product);
        ptx::pin(weights);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < T::kTileN / 32; ++k) {
            ptx::Wgmma<T::kPv, kPieceColumns>::rs(
                product, &weights[4 * k],
                ptx::advance(values, kPiece * kPieceColumns * ptx::kPanelRowBytes +
                                         ptx::k_slice_bytes(k, T::kDimV)),
                k != 0 ? 1 : 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::pin(product);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
            float& sum = acc[kPiece * kProducts + i];
            sum = fmaf(product[i], value_step, sum);
        }
        if constexpr (kPiece + 1 < kPieces) {
            multiply_pieces<kPiece + 1>(acc, product, weights, value_step, values);
        }
    }
    ADAATTN_DEVICE void multiply_values(float (&acc)[T::kDimV / 2], u32 (&weights)[kWeightWords],
                                        float value_step) const {
        const int stage = TileRing::index(this->tiles - 1);
        if constexpr (T::kCodesPv) {
            float product[kProducts];
            ptx::mbarrier_wait(this->barriers.value_full(stage), TileRing::parity(this->tiles - 1));
            const u64 values =
                ptx::matrix_descriptor(this->smem + T::kValueOffset + stage * T::kValueBytes, 0);
            multiply_pieces<0>(acc, product, weights, value_step, values);
        } else {
            u32 rest[1];
            this->start_output(acc, weights, rest);
            ptx::wgmma_wait<0>();
            ptx::pin(acc);
        }
        ptx::pin(weights);
        this->release(this->barriers.value_empty(stage));
    }

    // Weights as the next product takes them; the four of a word are keys that the quantiser laid
    // side by side.
    ADAATTN_DEVICE static void pack(const float (&p)[kScores], u32 (&weights)[kWeightWords]) {
        if constexpr (T::kCodesPv) {
#pragma unroll
            for (int i = 0; i < kScores / 4; ++i) {
                const int at = 8 * (i / 2) + 2 * (i % 2);
                weights[i] = ptx::pack_e4m3(p[at], p[at + 1], p[at + 4], p[at + 5]);
            }
        } else {
            softmax::round_pairs<T::kFormat>(p, weights);
        }
    }

    ADAATTN_DEVICE bool advance(float (&scores)[kScores], const float (&multiplier)[2][kSpans],
                                bool masked, bool fresh, float (&factor)[2]) {
        if (masked) {
            mask::apply(scores, this->cursor.item(), this->cursor.current(),
                        this->cursor.position(), this->cursor.keys_left(),
                        this->row() + this->lane() / 4, this->lane());
        }
        return softmax.advance(scores, multiplier, kOrigin, quantised().weight_slack, fresh,
                               factor);
    }
    ADAATTN_DEVICE void weigh(float (&scores)[kScores], const float (&multiplier)[2][kSpans],
                              u32 (&weights)[kWeightWords]) {
        softmax.weigh(scores, multiplier, kOrigin, quantised().weight_log2);
        pack(scores, weights);  // in one block with the exponentials: hidden behind them
    }

    // Writes the lse of this warp's 16 rows and leaves the reciprocals of two row sums.
    ADAATTN_DEVICE void write_lse(float (&inverse_sum)[2]) const {
        const work::WorkRecord<T::kMaxSources>& record = *this->cursor.record;
        const work::WorkItem& item = record.item;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int own_row = this->row() + this->lane() / 4 + 8 * r;
            float sum = softmax::quad_sum(softmax.sum[r]);
            if (sum == 0.0f && own_row < item.rows) {
                sum = softmax::known_sum(sum, sees_key<T::kRole>(quantised(), record, own_row));
            }
            inverse_sum[r] = sum == 0.0f ? 0.0f : ptx::reciprocal_approx(sum);
            if (this->lane() % 4 == 0 && own_row < item.rows) {
                float lse = softmax.lse(r, sum, quantised().weight_log2);
                if constexpr (T::kCodesQk) {
                    if (sum != 0.0f) lse += __ldg(quantised().lse_shift + row_place(r));
                }
                float* place =
                    static_cast<float*>(const_cast<void*>(quantised().lse.data)) +
                    quantised().lse.offset(item.batch, item.head, item.row_first + own_row);
                *place = lse;
            }
        }
    }

    ADAATTN_DEVICE void write_item(int item, float (&acc)[T::kDimV / 2], float (&inverse_sum)[2]) {
        write_rows<T::kFormat, T::kDimV, T::kRole, softmax::kPlain, T::kTileM>(
            quantised(), this->record(item), acc, inverse_sum, this->row(), this->lane());
    }

    // The item before the one at hand, whose last product is there.
    ADAATTN_DEVICE void finish_item(float (&acc)[T::kDimV / 2], float (&inverse_sum)[2]) {
        write_item(this->items - 2, acc, inverse_sum);
        ptx::mbarrier_arrive(this->barriers.record_empty(RecordRing::index(this->items - 2)));
        softmax::clear(acc);
    }

    // From a tile's raw scores to its weights. Returns whether the output must be multiplied by
    // `factor` before the tile's product is added.
    ADAATTN_DEVICE bool soften(RawScore (&raw)[kScores], u32 (&weights)[kWeightWords],
                               float& value_step, bool fresh, float (&factor)[2]) {
        float scores[kScores];
        float multiplier[2][kSpans];
        read_scales(multiplier, value_step);  // while the scores are on their way
        const bool masked = this->mask_needed();
        ptx::wgmma_wait<0>();
        finish_raw(raw, scores);
        const bool moved = advance(scores, multiplier, masked, fresh, factor);
        weigh(scores, multiplier, weights);
        return moved;
    }

    // The loop of sm90_attn_fwd_f16.cuh, its products one after the other. With turns, a consumer
    // multiplies while the others compute weights.
    ADAATTN_DEVICE void run() {
        float acc[T::kDimV / 2];
        RawScore raw[kScores];
        u32 weights[kWeightWords];
        float factor[2];
        float value_step = 0.0f;
        softmax::clear(acc);
        if (!open()) return;
        this->wait_turn();
        start_raw(raw);
        this->pass_turn();
        soften(raw, weights, value_step, true, factor);

#pragma unroll 1
        while (true) {
            const bool boundary = this->cursor.at_last();
            if (boundary) {
                write_lse(factor);
                if (!open()) break;
            } else {
                this->cursor.next(this->params.sources);
            }
            this->wait_turn();
            multiply_values(acc, weights, value_step);
            if (boundary) finish_item(acc, factor);
            start_raw(raw);
            this->pass_turn();
            const bool moved = soften(raw, weights, value_step, boundary, factor);
            if (moved && !boundary) softmax::rescale_rows(acc, factor);
        }
        multiply_values(acc, weights, value_step);
        write_item(this->items - 1, acc, factor);
    }
};

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    sm90_attn_fwd_f16::run_roles<T, Consumer>(params);
}

}  // namespace sm90_attn_fwd_8bit
}  // namespace adaattn
