"""Who takes part in gpu_adaptive.py: this library within budgets and dense, and its peers.

A peer that cannot be imported or refuses a shape is left out, and the report says why.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core import ErrorBudget, Mask, attention, get_backend
from adaptive_clock import Burst, by_events, by_host
from adaptive_data import CUDNN, DENSE, name_of

FA3, SAGE, SPARGE = "FA3", "SageAttention", "SpargeAttn"


@dataclass
class Heads:
    """One causal problem: q (1, heads_q, len, dim), k and v (1, heads_kv, len, dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.q.shape[2])

    @property
    def count(self) -> int:
        """Query heads."""
        return int(self.q.shape[1])

    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return all three with as many key/value heads as query heads."""
        group = self.count // self.k.shape[1]
        return self.q, *(x.repeat_interleave(group, dim=1) for x in (self.k, self.v))


@dataclass
class Contender:
    """Something that computes a problem's output.

    Attributes
    ----------
    call : callable
        Computes it; what it returns is `out_of`'s argument.
    burst : Burst
        Times it.
    out_of : callable
        Output of shape (1, heads_q, len, dim) as a torch tensor.
    """

    call: Callable[[], Any]
    burst: Burst
    out_of: Callable[[Any], torch.Tensor] = lambda result: result


def ours(heads: Heads, rel: float, **options: Any) -> Callable[[], Any]:
    """Return one whole call within a budget: probe, plan, run, certify, escalate."""
    budget, mask = ErrorBudget(rel=rel), Mask.causal()
    backend = "cuda" if heads.q.is_cuda else "numpy"

    def call() -> Any:
        return attention(
            heads.q, heads.k, heads.v, mask=mask, budget=budget, backend=backend, **options
        )

    return call


def _dense(heads: Heads) -> Callable[[], Any]:
    mask = Mask.causal()
    if not heads.q.is_cuda:
        return lambda: attention(heads.q, heads.k, heads.v, mask=mask, backend="numpy").out
    forward = get_backend("cuda").forward  # type: ignore[attr-defined]
    return lambda: forward(heads.q, heads.k, heads.v, mask=mask)[0]


def _sdpa(heads: Heads) -> Callable[[], Any]:
    """Return torch's cuDNN backend; keys and values are widened out of the clock."""
    arrays = heads.wide()
    compute = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        if not heads.q.is_cuda:
            return compute(*arrays, is_causal=True)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return compute(*arrays, is_causal=True)

    return call


def _sage(heads: Heads) -> Callable[[], Any]:
    sage = importlib.import_module("sageattention").sageattn
    key = heads.k.clone()  # SageAttention 1 subtracts the mean key in place
    return lambda: sage(heads.q, key, heads.v, tensor_layout="HND", is_causal=True)


def _sparge(heads: Heads) -> Callable[[], Any]:
    module = importlib.import_module("spas_sage_attn")
    arrays = heads.wide()
    sparse = module.spas_sage2_attn_meansim_topk_cuda
    return lambda: sparse(*arrays, topk=0.5, is_causal=True)


def _fa3_torch(heads: Heads) -> Callable[[], Any]:
    flash = importlib.import_module("flash_attn_interface").flash_attn_func
    arrays = [x.transpose(1, 2) for x in (heads.q, heads.k, heads.v)]

    def call() -> Any:
        out = flash(*arrays, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


@cache
def _flash_mha() -> tuple[Any, Any]:
    """Return jax and the jitted function, which it compiles once a shape."""
    jax = importlib.import_module("jax")
    flash = importlib.import_module("flash_attn3_jax").flash_mha
    return jax, jax.jit(lambda q, k, v: flash(q, k, v, is_causal=True))


def _fa3_jax(heads: Heads) -> Contender:
    jax, compiled = _flash_mha()
    arrays = [
        jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous())
        for x in (heads.q, heads.k, heads.v)
    ]
    return Contender(
        call=lambda: compiled(*arrays),
        burst=by_host(lambda: compiled(*arrays), lambda out: out.block_until_ready()),
        out_of=lambda out: torch.from_dlpack(out.block_until_ready()).transpose(1, 2),
    )


def _fa3(heads: Heads) -> Contender | Callable[[], Any]:
    """Return FlashAttention-3's own package, or the wheel flash_attn3_jax."""
    try:
        return _fa3_torch(heads)
    except ImportError:
        return _fa3_jax(heads)


MAKERS: dict[str, Callable[[Heads], Any]] = {
    CUDNN: _sdpa,
    DENSE: _dense,
    FA3: _fa3,
    SAGE: _sage,
    SPARGE: _sparge,
}


def contenders(
    heads: Heads, budgets: list[float], peers: list[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Everybody who can compute this problem, and why the others cannot."""
    found: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    timed = by_events if heads.q.is_cuda else by_host
    makers = {name: MAKERS[name] for name in peers} | {
        name_of(rel): lambda h, r=rel: Contender(
            call=(call := ours(h, r)), burst=timed(call), out_of=lambda result: result.out
        )
        for rel in budgets
    }
    for name, make in makers.items():
        try:
            made = make(heads)
            if not isinstance(made, Contender):
                made = Contender(call=made, burst=timed(made))
            made.call()
            if heads.q.is_cuda:
                torch.cuda.synchronize()
            found[name] = made
        except Exception as error:  # peers refuse in many ways, and none may stop the others
            absent[name] = f"{type(error).__name__}: {error}".strip()[:300]
            print(f"left out: {name}: {absent[name]}", file=sys.stderr, flush=True)
    return found, absent
