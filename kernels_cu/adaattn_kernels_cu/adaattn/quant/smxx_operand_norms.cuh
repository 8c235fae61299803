// smxx_operand_norms.cuh -- largest norms and rounding residuals of query, key and value rows, the
// spread of the values, and the energy of out.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    The figures that certificates rest on, in one pass over the four arrays. A unit is
//              one head of one array; params.blocks blocks share its rows; a warp reads four rows
//              at
//              a time, a row by eight lanes, 16 bytes each where the rows allow it. Every block
//              writes its own record of kSlots doubles, so the host's reduction over records gives
//              the same bits whatever order the blocks ran in.
//                query, key, value   largest |x|^2; largest |x - round(x)|^2 in bf16, f16, tf32
//                value               also largest |x - c|^2, c near the mean: any c bounds the
//                                    diameter by twice the distance (triangle inequality)
//                out                 sum of |x|^2
//              Source: this project, docs/math/08-composition.md, theorem 8, which needs these.
//              Numerics     Elements widen to f64 exactly, and squares of f32 numbers neither
//              overflow nor
//              underflow there, so nothing is scaled: relative error below 300 * 2^-53, covered by
//              the host. Roundings are those of the attention kernels' operands: f16 saturates,
//              tf32
//              rounds ties away from zero. Rows of query, key and value that hold NaN or Inf are
//              left
//              out (a row that sees one is not finite, and the certificate says so); out keeps
//              them,
//              so that its sum is not finite either. Tiles        None: rows are streamed.
// Shared mem   | name    | type | shape          | live                 |
//              | centre  | f32  | kMaxDim        | value units          |
//              | records | f64  | kWarps, kSlots | after the last row   |
//              Static; no dynamic shared memory. Registers    kRowsAtOnce * kSlots doubles of sums.
//              Barriers     (1) all threads, after the centre is written and before rows read it;
//              (2) all
//              threads, after each warp's record and before thread 0..kSlots-1 reduce them. Limits
//              dim <= kMaxDim (the host has checked); 64-bit offsets. Ladder       none: it moves
//              each array once.
//
// Budget: registers<=255 spill_bytes=0 smem_bytes<=8192
#pragma once

#include "adaattn/common/format.cuh"
#include "adaattn/ptx/sm80.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::smxx_operand_norms {

enum Array : int { kQuery, kKey, kValue, kOut, kArrays };

// Figures of a record, all squared; the twin is SLOTS of adaattn_cuda/kernels/smxx_operand_norms.py.
enum Slot : int {
    kNorm,          // of a row; in `out` the sum over rows
    kResidualBf16,  // of a row: what rounding to the format takes away
    kResidualF16,
    kResidualTf32,
    kDistance,  // of a value row from the centre
    kSlots
};

constexpr int kMaxDim = 256;
constexpr int kCentreRows = 32;
constexpr int kRowLanes = 8;  // lanes that share a row
constexpr int kWarpRows = 32 / kRowLanes;

// (batch, head, row, dim) with unit stride along dim; strides in elements. The twin is
// _Rows of adaattn_cuda/kernels/smxx_operand_norms.py.
struct Rows {
    const void* data;
    const unsigned char* counted;  // a byte a row of each head, 0: left out; null: all count
    i64 batch;
    i64 head;
    i64 row;
    i64 counted_unit;  // from one head's bytes to the next one's
    i32 heads;
    i32 len;
    i32 dim;
    i32 first_unit;
};

struct Params {
    Rows arrays[kArrays];
    double* records;  // (units, blocks, kSlots)
    i32 blocks;
    i32 vectorised;  // every row begins on 16 bytes and holds whole 16-byte chunks
};

static_assert(sizeof(Params) == 272, "mirrored by the host");

template <Format kInput_>
struct Traits {
    static constexpr Format kInput = kInput_;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRowsAtOnce = 2;
    static constexpr int kChunk = is_narrow(kInput) ? 8 : 4;  // elements in 16 bytes
    static constexpr int kSmemBytes = 0;
};

ADAATTN_DEVICE bool is_finite(float x) { return (ptx::float_bits(x) & 0x7f800000u) != 0x7f800000u; }

ADAATTN_DEVICE double larger_double(double a, double b) { return a < b ? b : a; }

// Squared residual of one rounding; exact zero where the input already has the format.
template <Format kInput, Format kTo>
ADAATTN_DEVICE double residual(float x) {
    if constexpr (kInput == kTo || (kTo == Format::tf32 && kInput != Format::f32)) {
        return 0.0;
    } else {
        float rounded;
        if constexpr (kTo == Format::tf32) {
            rounded = ptx::bits_float(quant::tf32_high(ptx::float_bits(x)));
        } else {
            const float kept = kTo == Format::f16 ? quant::saturate_f16(x) : x;
            const u16 bits = static_cast<u16>(quant::pack_pair<kTo>(kept, 0.0f) & 0xffffu);
            rounded = kTo == Format::bf16 ? ptx::from_bf16(bits) : ptx::from_f16(bits);
        }
        const double lost = static_cast<double>(x) - static_cast<double>(rounded);
        return lost * lost;
    }
}

// The first `count` of kChunk elements, zeros after them.
template <class T>
ADAATTN_DEVICE void load_chunk(float (&x)[T::kChunk], const void* data, i64 index, int count,
                               bool vectorised) {
    if (vectorised && count == T::kChunk) {
        const i64 byte = index * storage_bytes(T::kInput);
        const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const char*>(data) + byte);
        const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < T::kChunk; ++i) {
            if constexpr (is_narrow(T::kInput)) {
                const u16 bits = static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
                x[i] = T::kInput == Format::bf16 ? ptx::from_bf16(bits) : ptx::from_f16(bits);
            } else {
                x[i] = ptx::bits_float(words[i]);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < T::kChunk; ++i) {
        x[i] = i < count ? quant::load_element<T::kInput>(data, index + i) : 0.0f;
    }
}

// Mean of up to kCentreRows evenly spaced rows that count, column by column; what is not finite is
// taken for 0.
template <class T>
ADAATTN_DEVICE void find_centre(const Rows& rows, const unsigned char* counted, i64 base,
                                float* centre) {
    const int count = smaller(rows.len, kCentreRows);
    for (int column = static_cast<int>(threadIdx.x); column < kMaxDim; column += T::kThreads) {
        double sum = 0.0;
        int summed = 0;
        for (int i = 0; column < rows.dim && i < count; ++i) {
            const i64 row = static_cast<i64>(i) * rows.len / count;
            if (counted != nullptr && !counted[row]) continue;
            ++summed;
            const float x =
                quant::load_element<T::kInput>(rows.data, base + row * rows.row + column);
            sum += is_finite(x) ? static_cast<double>(x) : 0.0;
        }
        centre[column] = static_cast<float>(sum / larger(summed, 1));
    }
}

template <class T>
ADAATTN_DEVICE void run(const Params& params) {
    __shared__ float centre[kMaxDim];
    __shared__ double records[T::kWarps][kSlots];
    const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
    const int unit = static_cast<int>(blockIdx.x) / params.blocks;
    const int block = static_cast<int>(blockIdx.x) % params.blocks;
    int which = 0;
    while (which + 1 < kArrays && unit >= params.arrays[which + 1].first_unit) {
        ++which;
    }
    const Rows rows = params.arrays[which];
    const int index = unit - rows.first_unit;
    const i64 base = (index / rows.heads) * rows.batch + (index % rows.heads) * rows.head;
    const bool is_out = which == kOut, is_value = which == kValue;
    const unsigned char* counted =
        rows.counted == nullptr ? nullptr : rows.counted + index * rows.counted_unit;
    if (is_value) {
        find_centre<T>(rows, counted, base, centre);
    }
    __syncthreads();  // all threads: the centre is written before anyone reads it

    // Lanes 8 i .. 8 i + 7 of a warp share row i of each four; best is the same in all eight.
    const int part = lane % kRowLanes;
    constexpr int kChunk = T::kChunk;
    double best[kSlots] = {};
    const int start = (block * T::kWarps + warp) * kWarpRows;
    const int step = params.blocks * T::kWarps * kWarpRows;
    for (int first = start; first < rows.len; first += step * T::kRowsAtOnce) {
        double sums[T::kRowsAtOnce][kSlots] = {};
        bool finite[T::kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < T::kRowsAtOnce; ++r) {
            finite[r] = true;
        }
        for (int column = part * kChunk; column < rows.dim; column += kRowLanes * kChunk) {
            float x[T::kRowsAtOnce][kChunk];
#pragma unroll
            for (int r = 0; r < T::kRowsAtOnce; ++r) {
                const int row = first + lane / kRowLanes + r * step;
                const int count = row < rows.len ? smaller(rows.dim - column, kChunk) : 0;
                load_chunk<T>(x[r], rows.data, base + static_cast<i64>(row) * rows.row + column,
                              count, params.vectorised != 0);
            }
#pragma unroll
            for (int r = 0; r < T::kRowsAtOnce; ++r) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) {
                    const double wide = static_cast<double>(x[r][i]);
                    sums[r][kNorm] += wide * wide;
                    if (!is_out) {
                        finite[r] = finite[r] && is_finite(x[r][i]);
                        sums[r][kResidualBf16] += residual<T::kInput, Format::bf16>(x[r][i]);
                        sums[r][kResidualF16] += residual<T::kInput, Format::f16>(x[r][i]);
                        sums[r][kResidualTf32] += residual<T::kInput, Format::tf32>(x[r][i]);
                    }
                    if (is_value) {  // columns past dim read as 0, and so does the centre there
                        const double apart = wide - static_cast<double>(centre[column + i]);
                        sums[r][kDistance] += apart * apart;
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < T::kRowsAtOnce; ++r) {
            const int row = first + lane / kRowLanes + r * step;
            const bool exists = row < rows.len && (counted == nullptr || counted[row]);
            const u32 agreed = __ballot_sync(kFullWarp, finite[r]) >> (lane & ~(kRowLanes - 1));
            const bool counts =
                exists && (agreed & ((1u << kRowLanes) - 1)) == (1u << kRowLanes) - 1;
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                double sum = sums[r][slot];
#pragma unroll
                for (int distance = kRowLanes / 2; distance > 0; distance >>= 1) {
                    sum += __shfl_xor_sync(kFullWarp, sum, distance);
                }
                if (is_out) {
                    best[slot] += sum;
                } else if (counts) {
                    best[slot] = larger_double(best[slot], sum);
                }
            }
        }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int distance = kRowLanes; distance < 32; distance <<= 1) {
            const double other = __shfl_xor_sync(kFullWarp, best[slot], distance);
            best[slot] = is_out ? best[slot] + other : larger_double(best[slot], other);
        }
    }
    if (lane < kSlots) {
        double own = best[kNorm];
#pragma unroll
        for (int slot = kNorm + 1; slot < kSlots; ++slot) {
            own = lane == slot ? best[slot] : own;
        }
        records[warp][lane] = own;
    }
    __syncthreads();  // all threads: every warp's record is there before it is reduced
    if (threadIdx.x < kSlots) {
        double total = 0.0;
        for (int w = 0; w < T::kWarps; ++w) {
            const double one = records[w][threadIdx.x];
            total = is_out ? total + one : larger_double(total, one);
        }
        params.records[static_cast<i64>(blockIdx.x) * kSlots + threadIdx.x] = total;
    }
}

}  // namespace adaattn::smxx_operand_norms
