"""The rendered unit is pinned byte for byte: every cached kernel hangs on it."""

from __future__ import annotations

import dataclasses

import pytest

import adaattn_kernels_cu as kernels
from adaattn_cuda.jit.codegen import ENTRY, render
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.tuning.sm80_attn_fwd import specialise

GOLDEN = """\
#include "adaattn/attn/example.cuh"

using Traits = adaattn::example::Traits<adaattn::Format::bf16, 128, true, false>;
static_assert(Traits::kSmemBytes == 4096, "host and kernel disagree on smem");

extern "C" __global__ void
__launch_bounds__(Traits::kThreads, adaattn::resident_blocks<Traits>(0))
adaattn_entry(const __grid_constant__ adaattn::example::Params params) {
    adaattn::example::run<Traits>(params);
}
"""


def test_unit_is_pinned() -> None:
    spec = KernelSpec("example", ("adaattn::Format::bf16", 128, True, False), 4096, "sm_90a")
    assert render(spec) == GOLDEN
    assert ENTRY in GOLDEN


def test_every_field_of_a_trait_reaches_the_unit() -> None:
    base = specialise("sm_90a", "bf16", "bf16", "bf16", 128, 128)
    seen = {render(base.spec("sm_90a"))}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        changed = {str: "f16", bool: not value, int: value}[type(value)]
        changed = (value * 2 or 1) if type(value) is int else changed
        text = render(dataclasses.replace(base, **{field.name: changed}).spec("sm_90a"))
        assert text not in seen, field.name
        seen.add(text)


def test_closure_follows_includes() -> None:
    found = kernels.closure("adaattn/attn/sm80_attn_fwd.cuh")
    assert "adaattn/ptx/sm80.cuh" in found
    assert "adaattn/softmax/row_state.cuh" in found
    assert set(found) <= set(kernels.names())


def test_digest_sees_a_change_deep_in_the_closure(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adaattn" / "attn"
    folder.mkdir(parents=True)
    (folder / "a.cuh").write_text('#include "adaattn/attn/b.cuh"\n#include <cuda_fp16.h>\n')
    (folder / "b.cuh").write_text('#include "c.cuh"\n')
    (folder / "c.cuh").write_text("int x;\n")
    monkeypatch.setattr(kernels, "root", lambda: tmp_path)
    before = kernels.digest("adaattn/attn/a.cuh")
    assert list(kernels.closure("adaattn/attn/a.cuh")) == [
        f"adaattn/attn/{n}.cuh" for n in "abc"
    ]
    (folder / "c.cuh").write_text("int y;\n")
    assert kernels.digest("adaattn/attn/a.cuh") != before


def test_every_kernel_header_states_its_budget() -> None:
    for name in kernels.names():
        if "_attn_fwd" in name and name.startswith("adaattn/attn/"):
            assert "// Budget: " in kernels.source(name), name
