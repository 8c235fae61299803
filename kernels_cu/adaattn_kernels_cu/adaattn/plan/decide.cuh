// decide.cuh -- the decision rule: what was measured of a head in, the number of a candidate out.
// SPDX-License-Identifier: Apache-2.0
//
// Algorithm    decide: among candidates whose limits the head keeps, whose measured error is at
//              most `aim` and whose numbers are finite, the cheapest if its cost is below
//              `worthwhile`; else the dense fallback. Of equal costs the earlier candidate, which
//              is the safer one, counts. escalate: the same among the candidates before one that
//              failed. The rule is data: a policy fills the table on the host
//              (adaattn_core.policies.table), nothing is decided here that is not written in it.
// Numerics     float32, one rounding per operation, in the order written: __fmul_rn and __fadd_rn
//              are never contracted to an fma, so the NumPy twins decide_table and escalate_table
//              are equal bit for bit (tests/cuda/test_decide.py). NaN compares false, so that a
//              number that was not measured well never chooses a candidate.
// Limits       one thread per head; 0 <= count <= kMaxCandidates; costs are finite. Structs are
//              mirrored byte for byte by the NumPy dtypes TABLE, HEAD_MEASURES and CHOICE.
#pragma once

namespace adaattn::plan {

constexpr int kMaxCandidates = 12;
constexpr int kFallback = -1;
constexpr float kFloatMax = 3.402823466e+38f;

// Kinds of structures, from the safest to the cheapest.
enum Kind : int { kDense, kScoreSkip, kLowRank, kBlockSparse, kLandmark };

// Formats, widest first.
enum Format : int { kF64, kF32, kTf32, kF16, kBf16, kI8, kE4m3, kE5m2 };

// What became of a candidate, from the least to the most successful.
enum Outcome : int { kNothing, kNonfinite, kOutside, kInaccurate, kCostly, kChosen };

struct Candidate {
    int kind, qk, pv;
    float knob;   // tau of landmarks, lam of score-then-skip, rank of a low rank
    float fixed;  // cost relative to dense = fixed + slope * share
    float slope;  // fixed holds probe and certificate
    float entropy_below, saturation_most, score_most, share_most;
};

struct DecisionTable {
    int count;
    float aim, escalation_aim, worthwhile;
    Candidate candidates[kMaxCandidates];  // from the safest to the cheapest
};

struct HeadMeasures {
    float entropy_relative, saturation, score_max_abs, output_rms;
    float share[kMaxCandidates];
    float error[kMaxCandidates];  // at the budget's row quantile, relative to output_rms
};

struct Choice {
    int candidate;  // or kFallback
    int outcome;    // the largest among the candidates'
    float cost, error;
};

static_assert(sizeof(Candidate) == 40 && sizeof(DecisionTable) == 496,
              "the host's dtype TABLE has this size");
static_assert(sizeof(HeadMeasures) == 112 && sizeof(Choice) == 16,
              "the host's dtypes have these sizes");

// Neither negative, NaN nor infinite.
__device__ __forceinline__ bool is_finite(float x) { return x >= 0.0f && x <= kFloatMax; }

__device__ __forceinline__ bool facts_are_finite(const HeadMeasures& head) {
    return is_finite(head.entropy_relative) && is_finite(head.saturation) &&
           is_finite(head.score_max_abs) && is_finite(head.output_rms);
}

__device__ __forceinline__ Choice fallback() { return Choice{kFallback, kNothing, 1.0f, 0.0f}; }

// Takes candidate `c` if it is better than what was chosen so far at a cost of `best`.
__device__ __forceinline__ void consider(const DecisionTable& table, const HeadMeasures& head,
                                         int c, bool healthy, bool accurate, float& best,
                                         Choice& choice) {
    const Candidate& candidate = table.candidates[c];
    const float share = head.share[c];
    const float error = head.error[c];
    const float cost = __fadd_rn(candidate.fixed, __fmul_rn(candidate.slope, share));
    const bool inside = head.entropy_relative < candidate.entropy_below &&
                        head.saturation <= candidate.saturation_most &&
                        head.score_max_abs <= candidate.score_most && share <= candidate.share_most;
    int outcome = kChosen;
    if (!(healthy && is_finite(share) && is_finite(error))) {
        outcome = kNonfinite;
    } else if (!inside) {
        outcome = kOutside;
    } else if (!accurate) {
        outcome = kInaccurate;
    } else if (!(cost < best)) {
        outcome = kCostly;
    } else {
        best = cost;
        choice.candidate = c;
        choice.cost = cost;
        choice.error = error;
    }
    if (outcome > choice.outcome) choice.outcome = outcome;
}

__device__ inline Choice decide(const DecisionTable& table, const HeadMeasures& head) {
    Choice choice = fallback();
    float best = table.worthwhile;
    const bool healthy = facts_are_finite(head);
    for (int c = 0; c < table.count; ++c) {
        consider(table, head, c, healthy, head.error[c] <= table.aim, best, choice);
    }
    return choice;
}

// Chooses again after candidate `current` was certified to `upper` only, which missed the budget.
// Candidates of its kind are held to escalation_aim after their error was multiplied by
// max(upper / error of current, 1), without a division.
__device__ inline Choice escalate(const DecisionTable& table, const HeadMeasures& head, int current,
                                  float upper) {
    Choice choice = fallback();
    if (!(table.escalation_aim > 0.0f) || current < 0) return choice;
    float best = table.worthwhile;
    const bool healthy = facts_are_finite(head);
    const float known = head.error[current];
    const float reach = __fmul_rn(table.escalation_aim, known);
    for (int c = 0; c < current && c < table.count; ++c) {
        const float error = head.error[c];
        const bool again =
            known > 0.0f && error <= table.escalation_aim && __fmul_rn(error, upper) <= reach;
        const bool accurate =
            table.candidates[c].kind == table.candidates[current].kind ? again : error <= table.aim;
        consider(table, head, c, healthy, accurate, best, choice);
    }
    return choice;
}

}  // namespace adaattn::plan
