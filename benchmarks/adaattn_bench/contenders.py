"""Who takes part: this library exact and within budgets, and peers that are installed.

A peer that cannot be imported, or refuses a problem, is left out, and the report says why.
"""

from __future__ import annotations

import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from adaattn_bench.clock import (
    Burst,
    Call,
    by_events,
    by_host,
    by_host_together,
    reason,
    synchronize,
)
from adaattn_bench.devices import torch_module
from adaattn_bench.problems import Problem, Shape
from adaattn_core.api import attention
from adaattn_core.backend import Forwards
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.mask import Mask
from adaattn_core.plugins.registry import get_backend

EXACT = "exact"


def budget_name(rel: float) -> str:
    """Name of this library within a budget."""
    return f"budget {rel:g}"


@dataclass(slots=True)
class Contender:
    """Something that computes a problem's output.

    Attributes
    ----------
    call : callable
        Computes it; what it returns is `out_of`'s argument.
    burst : Burst
        Times it.
    out_of : callable
        Output of shape (batch, heads_q, len_q, dim): a NumPy array or a torch tensor.
    cold_ms : float
        Milliseconds of the first call: compiling and loading, where nothing was kept.
    own_memory : bool
        Whether its memory is another allocator's than torch's, and so unknown.
    """

    call: Call
    burst: Burst
    out_of: Callable[[Any], Any] = lambda out: out
    cold_ms: float = float("nan")
    own_memory: bool = False


@dataclass(slots=True)
class Field:
    """Everybody who can compute a problem, and why the others cannot."""

    found: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Given:
    """A problem where its contenders want it.

    Attributes
    ----------
    shape : Shape
    mask : Mask
    scale : float
        Factor on the scores.
    device : str
    tensors : tuple of tensor, or None without torch
        Query, key, value on the device.
    arrays : tuple of array
        What this library gets: NumPy arrays on a CPU, tensors on a GPU.
    """

    shape: Shape
    mask: Mask
    scale: float
    device: str
    tensors: tuple[Any, Any, Any] | None
    arrays: tuple[Any, Any, Any]

    @classmethod
    def on(cls, problem: Problem, device: str) -> Given:
        """Put a problem's arrays there."""
        host = (problem.query, problem.key, problem.value)
        tensors = None if torch_module() is None else problem.tensors(device)
        arrays = tensors if device == "cuda" and tensors is not None else host
        scale = problem.scale or default_scale(problem.shape.dim)
        return cls(problem.shape, problem.mask, scale, device, tensors, arrays)

    @classmethod
    def of(cls, query: Any, key: Any, value: Any) -> Given:
        """Causal attention of tensors where they lie, at the usual scale."""
        batch, heads_q, len_q, dim = query.shape
        shape = Shape(batch, heads_q, key.shape[1], len_q, key.shape[2], dim)
        tensors, mask = (query, key, value), Mask.causal("bottom_right")
        return cls(shape, mask, default_scale(dim), query.device.type, tensors, tensors)

    @property
    def causal(self) -> bool:
        """Whether the mask hides anything: a single row sees every key."""
        return self.shape.len_q > 1

    def torch_tensors(self) -> tuple[Any, Any, Any]:
        """Return the tensors; peers need torch."""
        if self.tensors is None:
            raise ImportError("torch is not installed")
        return self.tensors

    def wide(self) -> tuple[Any, Any, Any]:
        """Return them with as many key/value heads as query heads."""
        q, k, v = self.torch_tensors()
        group = q.shape[1] // k.shape[1]
        return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def default_scale(dim: int) -> float:
    """Factor on the scores where nothing else is asked for."""
    return 1.0 / math.sqrt(dim)


# --- this library -----------------------------------------------------------------------------
def ours(given: Given, rel: float, **options: Any) -> Call:
    """Return one whole call within a budget: probe, plan, run, certify, escalate."""
    budget = ErrorBudget(rel=rel)

    def call() -> Any:
        return attention(
            *given.arrays, mask=given.mask, scale=given.scale, budget=budget, **options
        )

    return call


def _exact(given: Given) -> Contender | Call:
    shared: dict[str, Any] = {"mask": given.mask, "scale": given.scale}
    backend = get_backend("auto", given.device)
    if isinstance(backend, Forwards):
        return lambda: backend.forward(*given.arrays, **shared)[0]
    return lambda: attention(*given.arrays, **shared).out


# --- torch ------------------------------------------------------------------------------------
def _sdpa(backend: str) -> Callable[[Given], Call]:
    def make(given: Given) -> Call:
        torch = torch_module()
        options = _torch_mask(given)
        arrays = given.wide() if backend == "EFFICIENT_ATTENTION" else given.torch_tensors()
        if arrays[0].shape[1] != arrays[1].shape[1]:
            options["enable_gqa"] = True
        compute = torch.nn.functional.scaled_dot_product_attention
        chosen = importlib.import_module("torch.nn.attention")
        only = getattr(chosen.SDPBackend, backend)

        def call() -> Any:
            with chosen.sdpa_kernel(only):
                return compute(*arrays, scale=given.scale, **options)

        return call

    return make


def _torch_mask(given: Given) -> dict[str, Any]:
    shape = given.shape
    if not given.causal:
        return {}
    if shape.len_q == shape.len_kv:
        return {"is_causal": True}
    bias = importlib.import_module("torch.nn.attention.bias")
    return {"attn_mask": bias.causal_lower_right(shape.len_q, shape.len_kv)}


def _flex(given: Given) -> Call:
    torch = torch_module()
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    q, k, v = given.torch_tensors()
    behind = k.shape[2] - q.shape[2]
    mask = flex.create_block_mask(
        lambda b, h, row, key: key <= row + behind, None, None, q.shape[2], k.shape[2], q.device
    )
    compute = torch.compile(flex.flex_attention)
    scale = given.scale
    return lambda: compute(q, k, v, block_mask=mask, enable_gqa=True, scale=scale)


# --- packages of others -----------------------------------------------------------------------
def _flash2(given: Given) -> Call:
    flash = importlib.import_module("flash_attn").flash_attn_func
    arrays = [x.transpose(1, 2) for x in given.torch_tensors()]
    scale = given.scale
    return lambda: flash(*arrays, causal=given.causal, softmax_scale=scale).transpose(1, 2)


def _flash3(given: Given) -> Call | Contender:
    try:
        flash = importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        return _flash3_jax(given)
    arrays = [x.transpose(1, 2) for x in given.torch_tensors()]

    def call() -> Any:
        out = flash(*arrays, causal=given.causal, softmax_scale=given.scale)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def flash3_of_jax() -> tuple[Any, Any]:
    """Return jax and FlashAttention-3's function of the wheel flash_attn3_jax.

    Raises
    ------
    ImportError
        If one of them is not installed.
    """
    # Read by JAX when it first touches the device, of which it would take three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = importlib.import_module("jax")
    return jax, importlib.import_module("flash_attn3_jax").flash_mha


@cache
def _flash3_compiled(scale: float) -> tuple[Any, Any]:
    """Return jax and the jitted function, which it compiles once a shape."""
    jax, flash = flash3_of_jax()
    return jax, jax.jit(lambda q, k, v: flash(q, k, v, softmax_scale=scale, is_causal=True))


def _flash3_jax(given: Given) -> Contender:
    jax, compiled = _flash3_compiled(given.scale)
    if given.shape.len_q != given.shape.len_kv:
        raise ValueError("measured for whole sequences only")
    arrays = [
        jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in given.torch_tensors()
    ]
    return Contender(
        call=lambda: compiled(*arrays),
        burst=by_host_together(lambda: compiled(*arrays), lambda out: out.block_until_ready()),
        out_of=lambda out: torch_module().from_dlpack(out).transpose(1, 2),
        own_memory=True,
    )


def _sage(given: Given) -> Call:
    sage = importlib.import_module("sageattention").sageattn
    q, k, v = given.torch_tensors()
    if given.causal and q.shape[2] != k.shape[2]:
        raise ValueError("its causal mask is aligned to the first key")
    key = k.clone()  # SageAttention 1 subtracts the mean key in place
    scale = given.scale
    return lambda: sage(q, key, v, tensor_layout="HND", is_causal=given.causal, sm_scale=scale)


def _sparge(given: Given) -> Call:
    module = importlib.import_module("spas_sage_attn")
    arrays = given.wide()
    sparse, scale = module.spas_sage2_attn_meansim_topk_cuda, given.scale
    return lambda: sparse(*arrays, topk=0.5, is_causal=given.causal, scale=scale)


def _xformers(given: Given) -> Call:
    ops = importlib.import_module("xformers.ops")
    arrays = [x.transpose(1, 2) for x in given.wide()]
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if given.causal else None
    scale = given.scale
    compute = ops.memory_efficient_attention
    return lambda: compute(*arrays, attn_bias=bias, scale=scale).transpose(1, 2)


PEERS: dict[str, Callable[[Given], Call | Contender]] = {
    "torch flash": _sdpa("FLASH_ATTENTION"),
    "torch cuDNN": _sdpa("CUDNN_ATTENTION"),
    "torch efficient": _sdpa("EFFICIENT_ATTENTION"),
    "torch math": _sdpa("MATH"),
    "FlexAttention": _flex,
    "FlashAttention-2": _flash2,
    "FlashAttention-3": _flash3,
    "SageAttention": _sage,
    "SpargeAttn": _sparge,
    "xFormers": _xformers,
}
USUAL_PEERS = {
    "cpu": ("torch flash",),
    "cuda": tuple(name for name in PEERS if name != "torch math"),
}
"""On a GPU all but the one that writes every score to memory; a CPU has few."""


def checked_peers(text: str, device: str) -> tuple[str, ...]:
    """Turn ``--peers`` into names.

    Raises
    ------
    ArgumentError
        If a name is unknown.
    """
    words = {"usual": USUAL_PEERS[device], "all": tuple(PEERS), "none": ()}
    if text in words:
        return words[text]
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ArgumentError(
            got=f"--peers {', '.join(unknown)}",
            needed=f"usual, all, none, or some of: {', '.join(PEERS)}",
            do="separate them by commas",
        )
    return names


def gather(given: Given, budgets: Sequence[float], peers: Sequence[str]) -> Field:
    """Make everybody, and call each once: that is the cold call."""
    makers: Mapping[str, Callable[[Given], Call | Contender]] = {
        **{budget_name(rel): partial(_within, rel) for rel in budgets},
        EXACT: _exact,
        **{name: PEERS[name] for name in peers},
    }
    field = Field()
    for name, make in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch explains at length what it cannot run
                made = _made(make(given), given)
                started = time.perf_counter()
                made.call()
                synchronize()
                made.cold_ms = 1e3 * (time.perf_counter() - started)
            field.found[name] = made
        except Exception as error:  # peers refuse in many ways, and none may stop the others
            field.absent[name] = reason(error)
    return field


def _within(rel: float, given: Given) -> Contender:
    call = ours(given, rel)
    return Contender(call, _timed(call, given), lambda result: result.out)


def _made(made: Call | Contender, given: Given) -> Contender:
    return made if isinstance(made, Contender) else Contender(made, _timed(made, given))


def _timed(call: Call, given: Given) -> Burst:
    return by_events(call) if given.device == "cuda" else by_host(call)
