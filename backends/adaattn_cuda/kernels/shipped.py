"""Which specialisations are compiled ahead, by `adaattn warmup` and by CI for their budgets."""

from __future__ import annotations

import adaattn_kernels_cu as kernels
from adaattn_cuda.jit.resources import Budget, parse_budget
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels import smxx_attn_bwd_sinks as backward_sinks
from adaattn_cuda.kernels import smxx_attn_decode as attn_decode
from adaattn_cuda.kernels import smxx_exact_rows as exact_rows
from adaattn_cuda.kernels import smxx_mask_seen as mask_seen
from adaattn_cuda.kernels import smxx_operand_norms as operand_norms
from adaattn_cuda.kernels import smxx_probe as sampling
from adaattn_cuda.kernels import smxx_quantize as quantiser
from adaattn_cuda.tuning import sm80_attn_bwd as sm80_backward
from adaattn_cuda.tuning import sm80_attn_fwd as sm80
from adaattn_cuda.tuning import sm90_attn_bwd_f16 as sm90_backward
from adaattn_cuda.tuning import sm90_attn_fwd_8bit as eight_bit
from adaattn_cuda.tuning import sm90_attn_fwd_f16 as sm90

__all__ = ["budget", "specs"]


def specs(arch: str) -> list[KernelSpec]:
    """Every shipped specialisation for an architecture, in a fixed order.

    Raises
    ------
    UnsupportedError
        If the architecture is older than Ampere or unknown.
    """
    anywhere = sm80.shipped(arch) + sm80_backward.shipped(arch)  # refuses what it does not know
    anywhere += backward_sinks.shipped(arch)
    own = []
    if arch == "sm_90a":
        own = sm90.shipped() + quantiser.shipped() + eight_bit.shipped()
        own += sm90_backward.shipped()
    shared = (
        sampling.shipped(arch)
        + exact_rows.shipped(arch)
        + operand_norms.shipped(arch)
        + mask_seen.shipped(arch)
        + attn_decode.shipped(arch)
    )
    return anywhere + own + shared


def budget(spec: KernelSpec) -> Budget:
    """Budget stated in the kernel's header."""
    return parse_budget(kernels.source(spec.header))
