// slack.cuh -- how far a row's running maximum may grow before its reference follows.
// SPDX-License-Identifier: Apache-2.0
//
// Probabilities then stay below 2^kSlackLog2 and the accumulators are rescaled rarely, which costs
// no accuracy in floating point. Source: the conditional rescaling of FlashAttention-4,
// arXiv 2603.05451. The host's twin is SLACK_LOG2, which it divides by the scale for sm90 kernels.
#pragma once

namespace adaattn::softmax {

constexpr float kSlackLog2 = 8.0f;

}  // namespace adaattn::softmax
