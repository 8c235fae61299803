"""KernelSpec -> CUDA C++ translation unit. Pure text: same spec, same bytes."""

from __future__ import annotations

from adaattn_cuda.jit.spec import KernelSpec, cpp

__all__ = ["ENTRY", "render"]

ENTRY = "adaattn_entry"
"""Unmangled name of the one kernel in every unit."""


def render(spec: KernelSpec) -> str:
    """Return the translation unit of ``spec``.

    The static assertion makes the compiler check the host's shared-memory arithmetic; the plain
    ``extern "C"`` entry lets a cached cubin be loaded without a name map.
    """
    namespace = f"adaattn::{spec.stem}"
    arguments = ", ".join(cpp(trait) for trait in spec.traits)
    traits, params = f"{namespace}::Traits<{arguments}>", "Params"
    if spec.rule:
        traits, params = f"adaattn::softmax::Ruled<{traits}, {spec.rule}>", "RuledParams"
    params = spec.params or params
    return f"""#include "{spec.header}"

using Traits = {traits};
static_assert(Traits::kSmemBytes == {spec.smem_bytes}, "host and kernel disagree on smem");

extern "C" __global__ void
__launch_bounds__(Traits::kThreads, adaattn::resident_blocks<Traits>(0))
{ENTRY}(const __grid_constant__ {namespace}::{params} params) {{
    {namespace}::run<Traits>(params);
}}
"""
