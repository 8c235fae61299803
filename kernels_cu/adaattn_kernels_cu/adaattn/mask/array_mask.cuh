// array_mask.cuh -- boolean and additive masks given as arrays. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adaattn/mask/interval.cuh"
#include "adaattn/quant/convert.cuh"

namespace adaattn::mask {

enum class BiasType : int { kNone = 0, kF32 = 1, kF16 = 2, kBf16 = 3 };

// Boolean and additive masks of one head; rows and keys count from the tile's
// first row and the source's first key.
struct ArrayMask {
    const unsigned char* allowed;
    const void* bias;
    i64 allowed_row, allowed_key, bias_row, bias_key;
    BiasType bias_type;

    template <class Params>
    ADAATTN_DEVICE ArrayMask(const Params& params, const WorkItem& item, const Source& source)
        : allowed(params.allowed),
          bias(params.bias),
          allowed_row(params.allowed_row),
          allowed_key(params.allowed_key),
          bias_row(params.bias_row),
          bias_key(params.bias_key),
          bias_type(params.bias_type) {
        const i64 batch = item.batch, head = item.head, row = item.row_first,
                  key = source.first_key;
        if (allowed != nullptr) {
            allowed += batch * params.allowed_batch + head * params.allowed_head +
                       row * allowed_row + key * allowed_key;
        }
        if (bias != nullptr) {
            const i64 offset = batch * params.bias_batch + head * params.bias_head +
                               row * bias_row + key * bias_key;
            bias = static_cast<const char*>(bias) + offset * (bias_type == BiasType::kF32 ? 4 : 2);
        }
    }

    // What is added to the scaled score, in natural units; -inf masks.
    ADAATTN_DEVICE float added(int row, int key) const {
        if (allowed != nullptr && !allowed[row * allowed_row + key * allowed_key]) {
            return -ptx::infinity();
        }
        const i64 index = row * bias_row + key * bias_key;
        switch (bias_type) {
            case BiasType::kF32:
                return quant::load_element<Format::f32>(bias, index);
            case BiasType::kF16:
                return quant::load_element<Format::f16>(bias, index);
            case BiasType::kBf16:
                return quant::load_element<Format::bf16>(bias, index);
            default:
                return 0.0f;
        }
    }
};

}  // namespace adaattn::mask
