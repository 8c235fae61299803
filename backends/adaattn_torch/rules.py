"""Rules: which budget, policy or plan holds for which layer, phase and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

import torch
from torch.nn.attention.bias import CausalBias

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch.functional import scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, listening
from adaattn_torch.prepare import foreign

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for some of the calls; of several rules that match, the first is taken.

    Parameters
    ----------
    layer : str
        Pattern of module names (``*``, ``?`` and ``[...]``, as in file names).
    heads : sequence of int, optional
        Query heads that it speaks of; default all.
    phase : {"prefill", "decode"}, optional
        Decode is a call with one query row. Default both.
    budget, policy, plan, backend
        What to use there; see `adaattn_core.attention`. A plan speaks of the rule's heads,
        numbered from 0.
    """

    layer: str = "*"
    heads: Sequence[int] | None = None
    phase: Phase | None = None
    budget: ErrorBudget | float | None = None
    policy: Policy | str | None = None
    plan: Plan | None = None
    backend: Backend | str = "auto"

    def __post_init__(self) -> None:
        if self.phase not in (None, "prefill", "decode"):
            raise ArgumentError(
                got=f"phase={self.phase!r}",
                needed='"prefill", "decode" or None for both',
                do="a call with one query row is decode, any other prefill",
            )

    def matches(self, layer: str, phase: Phase) -> bool:
        """Whether it speaks of a layer and phase."""
        if self.phase is not None and self.phase != phase:
            return False
        return self.layer == "*" or fnmatchcase(layer, self.layer)


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules in order, the last of which matches everything; and whether PyTorch may step in."""

    rules: tuple[Rule, ...] = (Rule(),)
    strict: bool = False

    def attention(
        self,
        layer: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        into: list[AttentionInfo] | None,
    ) -> torch.Tensor:
        """Compute attention of a named layer by the rules.

        Parameters
        ----------
        layer : str
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            Of `torch.nn.functional.scaled_dot_product_attention`.
        softcap, sinks
            See `adaattn_torch.scaled_dot_product_attention`.
        into : list of AttentionInfo or None
            Where to append one info per rule; None if nobody will ask.
        """
        if not all(isinstance(x, torch.Tensor) for x in (query, key, value)) or foreign(
            query, key, value
        ):
            groups, heads = [(self.rules[-1], [0])], 1  # PyTorch takes it, whatever the rule
        else:
            # Heads of 1 broadcast.
            heads = max(x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))
            phase: Phase = "decode" if query.dim() > 1 and query.shape[-2] == 1 else "prefill"
            groups = self.groups(layer, phase, heads)
        parts = []
        for rule, chosen in groups:
            if len(groups) == 1:
                operands, picked = (query, key, value, attn_mask), None
            else:
                operands = _pick(query, key, value, attn_mask, chosen)
                picked = tuple(chosen)
            gqa = enable_gqa and len(groups) == 1
            own = sinks if sinks is None or picked is None else sinks[list(picked)]
            call = partial(
                scaled_dot_product_attention, *operands, dropout_p, is_causal, scale, gqa,
                budget=rule.budget, policy=rule.policy, plan=rule.plan, backend=rule.backend,
                layer=layer, softcap=softcap, sinks=own, strict=self.strict,
            )  # fmt: skip
            if into is None:
                parts.append(call())
            else:
                with _keeping(into, picked):
                    parts.append(call())
        if len(groups) == 1:
            return parts[0]
        order = [head for _, chosen in groups for head in chosen]
        back = torch.tensor(sorted(range(heads), key=order.__getitem__), device=query.device)
        return torch.cat(parts, -3).index_select(-3, back)

    def groups(self, layer: str, phase: Phase, heads: int) -> list[tuple[Rule, list[int]]]:
        """Return heads by the rule that decides them."""
        matching = (rule for rule in self.rules if rule.matches(layer, phase))
        groups: list[tuple[Rule, list[int]]] = []
        left = list(range(heads))
        for rule in matching:
            chosen = left if rule.heads is None else [h for h in left if h in rule.heads]
            if chosen:
                groups.append((rule, chosen))
                left = [h for h in left if h not in chosen]
            if not left:
                break
        return groups


@contextmanager
def _keeping(into: list[AttentionInfo], heads: tuple[int, ...] | None) -> Iterator[None]:
    """Append the infos of what happens inside, each with the heads that it speaks of."""
    found: list[AttentionInfo] = []
    with listening(found):
        yield
    into += [replace(info, heads=heads) for info in found]


def _pick(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    heads: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tensors of some query heads, each with keys and values of its own."""
    total = max(x.shape[-3] for x in (query, key, value))
    index = torch.tensor(heads, device=query.device)

    def pick(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 3 or x.shape[-3] == 1:
            return x
        return x.index_select(-3, index // (total // x.shape[-3]))

    if attn_mask is not None and not isinstance(attn_mask, CausalBias):
        attn_mask = pick(attn_mask)
    return pick(query), pick(key), pick(value), attn_mask
