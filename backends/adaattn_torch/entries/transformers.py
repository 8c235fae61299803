"""Hugging Face transformers: ``model.set_attn_implementation("adaattn")``.

Attention and mask function are registered under one key. Causal masks, causal windows and
padding on the right reach attention as patterns (see `adaattn_torch.masks.transformers`), so
that a plan may choose every structure; anything else gets the boolean mask that transformers
makes for PyTorch's own attention.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import BackendUnavailableError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.policies.base import Policy
from adaattn_torch.cache.attending import SIGN, PagedSteps
from adaattn_torch.entries.recomputation import checkpoints
from adaattn_torch.masks.compact import CompactMask, written_out
from adaattn_torch.rules import Rule, Rules

KEY = "adaattn"
"""Name of the attention implementation in transformers."""


class _Overrides(threading.local):
    """Settings of this thread, the innermost last; in a repeated run, one for each call."""

    def __init__(self) -> None:
        self.stack: list[Rules | Iterator[Rules]] = []


_defaults = Rules()
_overrides = _Overrides()
# Settings of the calls inside of each checkpoint, in order.
_inside: WeakKeyDictionary[Any, list[Rules]] = WeakKeyDictionary()


def register_transformers(
    budget: ErrorBudget | float | None = None,
    *,
    policy: Policy | str | None = None,
    backend: Backend | str = "auto",
    rules: Iterable[Rule] = (),
    strict: bool = False,
) -> str:
    """Make ``"adaattn"`` an attention implementation of transformers (5.0 or later).

    May be called again to change the defaults; `budgets` changes them for a while.

    Parameters
    ----------
    budget, policy, backend
        For layers that no rule matches; see `adaattn_core.attention`.
    rules : iterable of Rule
        The first that matches decides; layers are named ``layers.0``, ``layers.1``, ...
    strict : bool
        Raise where PyTorch would have to compute.

    Returns
    -------
    str
        The key to pass to ``model.set_attn_implementation``.

    Raises
    ------
    BackendUnavailableError
        If transformers is missing or too old.
    """
    global _defaults
    try:
        from transformers import AttentionInterface  # noqa: PLC0415 -- an optional package
        from transformers.masking_utils import (  # noqa: PLC0415
            AttentionMaskInterface,
            sdpa_mask,
        )
    except ImportError as error:
        raise BackendUnavailableError(
            got=f"transformers: {error}",
            needed="transformers 5.0 or later",
            do="pip install 'transformers>=5'",
        ) from error
    _defaults = _settings(budget, policy, backend, rules, strict)
    AttentionInterface.register(KEY, attention_forward)
    # Under the same key: a model asks for the mask function of its attention's name.
    AttentionMaskInterface.register(KEY, _mask_function(sdpa_mask))
    return KEY


def _mask_function(sdpa_mask: Any) -> Any:
    """Return our mask function; transformers' own where it is called in another way."""
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        return sdpa_mask
    return import_module("adaattn_torch.masks.transformers").adaattn_mask


@contextmanager
def budgets(
    budget: ErrorBudget | float | None = None,
    *,
    policy: Policy | str | None = None,
    backend: Backend | str = "auto",
    rules: Iterable[Rule] = (),
    strict: bool = False,
) -> Iterator[None]:
    """Use other settings than the registered ones, in this context and thread.

    Parameters are those of `register_transformers`.
    """
    _overrides.stack.append(_settings(budget, policy, backend, rules, strict))
    try:
        yield
    finally:
        _overrides.stack.pop()


def _decide() -> Rules:
    """Return what holds for a call, and see to it that it does when a checkpoint repeats it."""
    found = _defaults
    for entry in _overrides.stack:
        found = entry if isinstance(entry, Rules) else next(entry, found)
    if _overrides.stack and not torch.compiler.is_compiling():
        for checkpoint in checkpoints():
            calls = _inside.get(checkpoint.owner)
            if calls is None:
                calls = _inside[checkpoint.owner] = []
                checkpoint.repeat_in(partial(_repeated, calls))
            calls.append(found)
    return found


@contextmanager
def _repeated(calls: list[Rules]) -> Iterator[None]:
    """Let the calls that are repeated have the settings that they had."""
    _overrides.stack.append(iter(list(calls)))
    try:
        yield
    finally:
        _overrides.stack.pop()


def _settings(
    budget: ErrorBudget | float | None,
    policy: Policy | str | None,
    backend: Backend | str,
    rules: Iterable[Rule],
    strict: bool,
) -> Rules:
    return Rules((*rules, Rule(budget=budget, policy=policy, backend=backend)), strict)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers; the signature is its attention interface.

    Soft-capped scores (Gemma-2) and attention sinks (gpt-oss) are computed by the backend,
    under `torch.compile` by plain operations. A sliding window is part of the mask; without a
    mask, `sliding_window` is what rows see, themselves included, the last row at the last key.

    Parameters
    ----------
    query : Tensor, shape (batch, heads_q, len_q, dim)
    key, value : Tensor, shape (batch, heads_kv, len_kv, dim)
    attention_mask : Tensor or None, broadcastable to (batch, heads_q, len_q, len_kv)
        Boolean (True = may attend) or additive.

    Returns
    -------
    out : Tensor, shape (batch, len_q, heads_q, dim), contiguous
    weights : None

    Raises
    ------
    UnsupportedError
        For paged caches, or attention weights; with ``strict``, for all that falls back.
    """
    settings = _decide()
    layer = _layer_name(module)
    if cache is not None:
        raise UnsupportedError(
            got="a paged cache",
            needed="keys and values as tensors",
            do='use model.generate, or another implementation such as "paged|sdpa"',
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            got="output_attentions=True",
            needed="a call without attention weights: they are never formed as a whole",
            do='use model.set_attn_implementation("eager") to look at weights',
        )
    steps = getattr(key, SIGN, None)
    if steps is not None:
        out = _over_pages(
            steps, query, attention_mask, scaling, sliding_window, dropout,
            {"softcap": softcap, "attention sinks": s_aux, "position_bias": position_bias},
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    len_q, len_kv = query.shape[2], key.shape[2]
    # transformers' own rule: a mask says it all; one query row sees every key.
    causal = len_q > 1 and attention_mask is None and is_causal
    if causal and len_kv > len_q:  # first fill of a static cache: later slots hold nothing
        key, value = key[:, :, :len_q], value[:, :, :len_q]
        position_bias = None if position_bias is None else position_bias[..., :len_q]
        len_kv = len_q
    if attention_mask is None and sliding_window is not None and len_kv > sliding_window:
        attention_mask, causal = _window(sliding_window, is_causal, query, len_kv), False
    ruled = softcap is not None or s_aux is not None
    if isinstance(attention_mask, CompactMask) and position_bias is not None:
        attention_mask = attention_mask.dense()
    if position_bias is not None:
        attention_mask, causal = _with_bias(attention_mask, position_bias, causal, query), False
    if ruled and attention_mask is not None and attention_mask.dtype not in (
        torch.bool, query.dtype
    ):  # fmt: skip
        attention_mask = attention_mask.to(query.dtype)
    out = settings.attention(
        layer,
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.reshape(-1),
        into=None,
    )
    return out.transpose(1, 2).contiguous(), None


def _over_pages(
    steps: PagedSteps,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
    others: dict[str, Any],
) -> torch.Tensor:
    """Attend over the pages of an `AdaptiveCache`, which keys and values stand for."""
    odd = [name for name, x in others.items() if x is not None]
    odd += ["dropout"] if dropout else []
    if odd:
        raise UnsupportedError(
            got=f"{' and '.join(odd)} over an AdaptiveCache",
            needed="plain attention over pages",
            do='use another attention implementation (model.set_attn_implementation("sdpa"))',
        )
    if isinstance(mask, CompactMask):
        mask = None if _is_causal(mask, query) else mask.dense()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    left = -1 if sliding_window is None else sliding_window - 1
    return steps.attend(query, mask, scale, left)


def _is_causal(mask: CompactMask, query: torch.Tensor) -> bool:
    """Whether the rows are those of the newest keys, and see all keys up to their own."""
    pattern = mask.pattern
    if pattern is None or pattern.lengths is not None or pattern.left is not None:
        return False
    return pattern.right == 0 and pattern.alignment == "bottom_right"


def _window(size: int, is_causal: bool, query: torch.Tensor, len_kv: int) -> torch.Tensor:
    """Return the mask of a causal window that no mask states."""
    if not is_causal:
        raise UnsupportedError(
            got=f"sliding_window={size} on both sides of {len_kv} keys, without a mask",
            needed="a mask: libraries differ in what such a window holds",
            do="pass attention_mask, as transformers' own mask functions make it",
        )
    pattern = Mask.sliding_window(size - 1, 0, "bottom_right")
    shape = (query.shape[0], 1, query.shape[2], len_kv)
    if torch.compiler.is_compiling():
        return written_out(pattern, shape, query.device)
    return CompactMask(pattern, shape, query.device)


def _layer_name(module: torch.nn.Module) -> str:
    number = getattr(module, "layer_idx", None)
    return "" if number is None else f"layers.{number}"


def _with_bias(
    mask: torch.Tensor | None, bias: torch.Tensor, causal: bool, query: torch.Tensor
) -> torch.Tensor:
    """Return one additive mask: what may be attended to, with its bias."""
    if mask is not None and mask.dtype != torch.bool:
        return (bias + mask).to(query.dtype)
    if causal:
        shape = (query.shape[2], bias.shape[-1])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    out = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return out.to(query.dtype)
