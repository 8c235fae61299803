"""Call: one attention, its tensors and what is asked; and how operators carry the latter."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy

_STRUCTURAL = ("alignment", "left", "right", "lengths", "cu_seqlens_q", "cu_seqlens_kv")
_handles: dict[str, Any] = {}
_handle_of: dict[int, str] = {}


class Asked(NamedTuple):
    """What is asked of one attention, apart from its tensors and mask.

    Attributes
    ----------
    budget : ErrorBudget or None
    policy : Policy, str or None
    plan : Plan or None
    backend : Backend or str
    layer : str
    seed : int or None
    """

    budget: ErrorBudget | None = None
    policy: Policy | str | None = None
    plan: Plan | None = None
    backend: Backend | str = "auto"
    layer: str = ""
    seed: int | None = None

    @property
    def is_exactness(self) -> bool:
        """Whether exact attention is all that is asked for, by whatever plan."""
        return (
            self.budget is None
            and self.policy is None
            and self.plan is None
            and self.seed is None
        )


class Call(NamedTuple):
    """One attention: checked four-dimensional tensors, and what is asked of them.

    Attributes
    ----------
    query : Tensor, shape (batch, heads_q, len_q, dim_qk)
    key : Tensor, shape (batch, heads_kv, len_kv, dim_qk)
    value : Tensor, shape (batch, heads_kv, len_kv, dim_v)
    allowed, bias : Tensor or None
        Boolean and additive masks of four dimensions, broadcastable to the scores.
    mask : Mask
        The structural part.
    scale : float
        Factor on the scores, > 0.
    asked : Asked
    shape : tuple of int or None
        Shape that the caller's output has, if that is not (batch, heads_q, len_q, dim_v).
    softcap : float or None
    sinks : Tensor or None, shape (heads_q,)
        Score rules, see `adaattn_core.scores`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    allowed: torch.Tensor | None
    bias: torch.Tensor | None
    mask: Mask
    scale: float
    asked: Asked
    shape: tuple[int, ...] | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def is_ruled(self) -> bool:
        """Whether there is a softcap, or sinks."""
        return self.softcap is not None or self.sinks is not None


def structural(mask: Mask) -> Mask:
    """Return a mask without its arrays."""
    return mask if mask.is_structural else replace(mask, allowed=None, bias=None)


def encode(mask: Mask, asked: Asked) -> tuple[str, float, float, float]:
    """Write it as operators can carry it: a text, and the budget's rel, rows and confidence.

    Names are written out, so that a compiled graph kept on disk means the same in another
    process; objects (plans, policies, backends) are named by a handle of this process. The
    budget's numbers stay numbers, which a compiler may treat as variables; rel is 0 without
    a budget.
    """
    budget = asked.budget
    text = encode_constants(
        (mask.alignment, mask.left, mask.right),
        (mask.lengths, mask.cu_seqlens_q, mask.cu_seqlens_kv),
        None if budget is None else (budget.guarantee, budget.on_violation),
        asked.policy,
        asked.plan,
        asked.backend,
        asked.layer,
        asked.seed,
    )
    if budget is None:
        return text, 0.0, 0.0, 0.0
    return text, budget.rel, budget.rows, budget.confidence


def encode_constants(
    window: tuple[Any, ...],
    lengths: tuple[Any, ...],
    budget: tuple[str, str] | None,
    policy: Any,
    plan: Any,
    backend: Any,
    layer: str,
    seed: int | None,
) -> str:
    """Write what is constant in a compiled graph; a compiler runs this while tracing."""
    return json.dumps(
        {
            "mask": dict(zip(_STRUCTURAL, (*window, *lengths), strict=True)),
            "budget": budget,
            "policy": _named(policy),
            "plan": _named(plan),
            "backend": _named(backend),
            "layer": layer,
            "seed": seed,
        }
    )


@lru_cache(maxsize=1024)
def decode(
    text: str, rel: float = 0.0, rows: float = 0.0, confidence: float = 0.0
) -> tuple[Mask, Asked]:
    """Invert `encode`.

    Raises
    ------
    ArgumentError
        If a handle was made by another process.
    """
    body = json.loads(text)
    mask: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in body["mask"].items()
    }
    words = body["budget"]
    asked = Asked(
        # A gradient is exact attention's: its operator carries no numbers of a budget.
        budget=None
        if words is None or rel == 0
        else ErrorBudget(rel, rows, confidence, *words),
        policy=_object(body["policy"]),
        plan=_object(body["plan"]),
        backend=_object(body["backend"]),
        layer=body["layer"],
        seed=body["seed"],
    )
    return Mask(**mask), asked


@lru_cache(maxsize=1024)
def asks_for_exactness(text: str) -> bool:
    """Whether a text of `encode` asks for exact attention: `Asked.is_exactness`."""
    body = json.loads(text)
    return all(body[name] is None for name in ("budget", "policy", "plan", "seed"))


def _named(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    handle = _handle_of.get(id(value))
    if handle is None:
        # Kept for good: a compiled graph may name it at any time, and id() stays unique.
        handle = _handle_of[id(value)] = uuid.uuid4().hex
        _handles[handle] = value
    return {"handle": handle}


def _object(named: Any) -> Any:
    if not isinstance(named, dict):
        return named
    try:
        return _handles[named["handle"]]
    except KeyError:
        raise ArgumentError(
            got="a compiled graph that names a plan, policy or backend of another process",
            needed="an object of this process",
            do="compile again here, or name the policy and the backend by their names",
        ) from None
