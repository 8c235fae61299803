// decide_unit.cpp -- decide.cuh on a CPU: products and sums are rounded one by one, as __fmul_rn and __fadd_rn do.
#include <cstddef>
#include "cpu.h"
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
#include "adaattn/plan/decide.cuh"
using namespace adaattn::plan;
extern "C" void decide_all(const DecisionTable* t, const HeadMeasures* m, int n, Choice* out) {
    for (int i = 0; i < n; ++i) out[i] = decide(*t, m[i]);
}
extern "C" void escalate_all(
    const DecisionTable* t, const HeadMeasures* m, const int* current, const float* upper, int n, Choice* out) {
    for (int i = 0; i < n; ++i) out[i] = escalate(*t, m[i], current[i], upper[i]);
}
extern "C" void offsets(long* o) {
    long found[] = {
        offsetof(Candidate, kind), offsetof(Candidate, qk), offsetof(Candidate, pv), offsetof(Candidate, knob),
        offsetof(Candidate, fixed), offsetof(Candidate, slope), offsetof(Candidate, entropy_below),
        offsetof(Candidate, saturation_most), offsetof(Candidate, score_most), offsetof(Candidate, share_most),
        offsetof(DecisionTable, count), offsetof(DecisionTable, aim), offsetof(DecisionTable, escalation_aim),
        offsetof(DecisionTable, worthwhile), offsetof(DecisionTable, candidates),
        offsetof(HeadMeasures, entropy_relative), offsetof(HeadMeasures, saturation),
        offsetof(HeadMeasures, score_max_abs), offsetof(HeadMeasures, output_rms),
        offsetof(HeadMeasures, share), offsetof(HeadMeasures, error),
        offsetof(Choice, candidate), offsetof(Choice, outcome), offsetof(Choice, cost), offsetof(Choice, error)};
    for (long x : found) *o++ = x;
}
extern "C" void codes(int* o) {
    int found[] = {kMaxCandidates, kFallback, kDense, kScoreSkip, kLowRank, kBlockSparse, kLandmark,
                   kF64, kF32, kTf32, kF16, kBf16, kI8, kE4m3, kE5m2};
    for (int x : found) *o++ = x;
}
