// far_unit.cpp -- planning kernels on a CPU, block by block.
#include "cuda_words.h"

#include "adaattn/plan/far_certify.cuh"
#include "adaattn/plan/far_decide.cuh"
#include "adaattn/plan/far_gather.cuh"
#include "adaattn/plan/far_list.cuh"
#include "adaattn/plan/far_merge.cuh"
#include "adaattn/plan/far_nest.cuh"
#include "adaattn/plan/far_prove.cuh"
#include "adaattn/plan/far_select.cuh"
#include "adaattn/plan/far_work.cuh"

namespace {

template <class Params>
Params held;

template <class Traits, class Params, void (*kBody)(const Params&)>
void launch(const Params* params, int blocks) {
    held<Params> = *params;
    words::grid = static_cast<unsigned>(blocks);
    for (int block = 0; block < blocks; ++block) {
        adaattn::ptx::emulation::run_block(block, Traits::kThreads, 0, [] { kBody(held<Params>); });
    }
}

constexpr auto kFormat = adaattn::Format::f16;
using Prove = adaattn::far_prove::Traits<512>;
using Nest = adaattn::far_nest::Traits<256>;
using Gather = adaattn::far_gather::Traits<256>;
using Decide = adaattn::far_decide::Traits<kFormat, 256>;
using Certify = adaattn::far_certify::Traits<kFormat, 512>;
using Work = adaattn::far_work::Traits<adaattn::far_work::kAttend>;
using Judge = adaattn::far_work::Traits<adaattn::far_work::kJudge>;
using Merge = adaattn::far_merge::Traits<kFormat, 16>;
using Select = adaattn::far_select::Traits<256>;
using List = adaattn::far_list::Traits<256>;

}  // namespace

extern "C" int gather_bytes() { return sizeof(adaattn::far_gather::Params); }
extern "C" int decide_bytes() { return sizeof(adaattn::far_decide::Params); }
extern "C" int certify_bytes() { return sizeof(adaattn::far_certify::Params); }
extern "C" int work_bytes() { return sizeof(adaattn::far_work::Params); }
extern "C" int select_bytes() { return sizeof(adaattn::far_select::Params); }
extern "C" void select_levels(const adaattn::far_select::Params* params, int blocks) {
    launch<Select, adaattn::far_select::Params, adaattn::far_select::run<Select>>(params, blocks);
}
extern "C" int list_bytes() { return sizeof(adaattn::far_list::Params); }
extern "C" void work(const adaattn::far_work::Params* params, int blocks) {
    launch<Work, adaattn::far_work::Params, adaattn::far_work::run<Work>>(params, blocks);
}
extern "C" void work_judge(const adaattn::far_work::Params* params, int blocks) {
    launch<Judge, adaattn::far_work::Params, adaattn::far_work::run<Judge>>(params, blocks);
}
extern "C" void list(const adaattn::far_list::Params* params, int blocks) {
    launch<List, adaattn::far_list::Params, adaattn::far_list::run<List>>(params, blocks);
}
extern "C" int merge_bytes() { return sizeof(adaattn::far_merge::Params); }
extern "C" void merge(const adaattn::far_merge::Params* params, int blocks) {
    launch<Merge, adaattn::far_merge::Params, adaattn::far_merge::run<Merge>>(params, blocks);
}
extern "C" int prove_bytes() { return sizeof(adaattn::far_prove::Params); }
extern "C" void prove(const adaattn::far_prove::Params* params, int blocks) {
    launch<Prove, adaattn::far_prove::Params, adaattn::far_prove::run<Prove>>(params, blocks);
}
extern "C" int nest_bytes() { return sizeof(adaattn::far_nest::Params); }
extern "C" void nest(const adaattn::far_nest::Params* params, int blocks) {
    launch<Nest, adaattn::far_nest::Params, adaattn::far_nest::run<Nest>>(params, blocks);
}
extern "C" void gather(const adaattn::far_gather::Params* params, int blocks) {
    launch<Gather, adaattn::far_gather::Params, adaattn::far_gather::run<Gather>>(params, blocks);
}
extern "C" void decide(const adaattn::far_decide::Params* params, int blocks) {
    launch<Decide, adaattn::far_decide::Params, adaattn::far_decide::run<Decide>>(params, blocks);
}
extern "C" void certify(const adaattn::far_certify::Params* params, int blocks) {
    launch<Certify, adaattn::far_certify::Params, adaattn::far_certify::run<Certify>>(params, blocks);
}
