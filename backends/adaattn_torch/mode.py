"""enable(): a context in which PyTorch's attention function keeps a budget, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.overrides import TorchFunctionMode

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_torch.functional import bypass, scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, listening

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
        return self.phase in (None, phase) and fnmatchcase(layer, self.layer)


class _Names(threading.local):
    def __init__(self) -> None:
        self.stack: list[str] = []


class enable(TorchFunctionMode):  # noqa: N801 -- used like a function
    """Let `torch.nn.functional.scaled_dot_product_attention` keep a budget in this context.

    The context holds for the calling thread; contexts nest, the innermost decides. Calls that
    no backend can do go to PyTorch, visibly (see `scaled_dot_product_attention`).

    Parameters
    ----------
    budget, policy, backend
        For calls that no rule matches; see `adaattn_core.attention`.
    rules : iterable of Rule
        The first that matches a layer, phase and head decides.
    model : torch.nn.Module, optional
        Its modules' names are what rules match and infos state. Without it every name is "".
    strict : bool
        Raise instead of falling back.

    Attributes
    ----------
    infos : list of AttentionInfo
        One per call and rule, in order, since the context was last entered.

    Examples
    --------
    >>> import torch, adaattn_torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 16)
    >>> with adaattn_torch.enable(budget=0.1) as mode:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> len(mode.infos), bool((mode.infos[0].certificate.upper <= 0.1).all())
    (1, True)
    """

    def __init__(
        self,
        budget: ErrorBudget | float | None = None,
        *,
        rules: Iterable[Rule] = (),
        model: torch.nn.Module | None = None,
        policy: Policy | str | None = None,
        backend: Backend | str = "auto",
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.rules = (*rules, Rule(budget=budget, policy=policy, backend=backend))
        self.model = model
        self.strict = strict
        self.infos: list[AttentionInfo] = []
        self._names = _Names()
        self._hooks: list[Any] = []

    def __enter__(self) -> enable:
        """Begin; names of the model's modules are followed from here on."""
        self.infos = []
        if self.model is not None:
            for name, module in self.model.named_modules():
                self._hooks += self._follow(name, module)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """End; the model's hooks are removed."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        while self._hooks:
            self._hooks.pop().remove()

    def _follow(self, name: str, module: torch.nn.Module) -> list[Any]:
        stack = self._names

        def push(_module: torch.nn.Module, _inputs: Any) -> None:
            stack.stack.append(name)

        def pop(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
            stack.stack.pop()

        return [
            module.register_forward_pre_hook(push),
            module.register_forward_hook(pop, always_call=True),
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take attention calls; let everything else pass."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or bypass.active:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        layer = self._names.stack[-1] if self._names.stack else ""
        heads = query.shape[-3] if query.dim() > 2 else 1
        phase: Phase = "decode" if query.shape[-2] == 1 else "prefill"
        groups = self._groups(layer, phase, heads)
        parts = []
        for rule, chosen in groups:
            if len(groups) == 1:
                operands, picked = (query, key, value, attn_mask), None
            else:
                operands = _pick(query, key, value, attn_mask, chosen)
                picked = tuple(chosen)
            found: list[AttentionInfo] = []
            with listening(found):
                out = scaled_dot_product_attention(
                    *operands,
                    dropout_p,
                    is_causal,
                    scale,
                    enable_gqa and len(groups) == 1,
                    budget=rule.budget,
                    policy=rule.policy,
                    plan=rule.plan,
                    backend=rule.backend,
                    layer=layer,
                    strict=self.strict,
                )
            parts.append(out)
            self.infos += [replace(info, heads=picked) for info in found]
        if len(groups) == 1:
            return parts[0]
        order = [head for _, chosen in groups for head in chosen]
        back = torch.tensor(sorted(range(heads), key=order.__getitem__), device=query.device)
        return torch.cat(parts, -3).index_select(-3, back)

    def call(self, layer: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute attention of a named layer by the rules, without entering the context.

        Parameters are those of `torch.nn.functional.scaled_dot_product_attention`.
        """
        self._names.stack.append(layer)
        try:
            return self._attention(*args, **kwargs)
        finally:
            self._names.stack.pop()

    def _groups(self, layer: str, phase: Phase, heads: int) -> list[tuple[Rule, list[int]]]:
        """Heads by the rule that decides them."""
        matching = [rule for rule in self.rules if rule.matches(layer, phase)]
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


def _pick(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    heads: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tensors of some query heads, each with keys and values of its own."""
    total = query.shape[-3]
    index = torch.tensor(heads, device=query.device)

    def pick(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 3 or x.shape[-3] == 1:
            return x
        return x.index_select(-3, index // (total // x.shape[-3]))

    mask = attn_mask
    if type(attn_mask) is torch.Tensor:
        mask = pick(attn_mask)
    return pick(query), pick(key), pick(value), mask
