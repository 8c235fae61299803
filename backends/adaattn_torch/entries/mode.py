"""enable(): a context in which PyTorch's attention function keeps a budget, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.overrides import TorchFunctionMode

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.policies.base import Policy
from adaattn_torch.entries.multihead import MultiHead
from adaattn_torch.entries.recomputation import Checkpoint, checkpoints
from adaattn_torch.info import AttentionInfo, bypass, fall_back
from adaattn_torch.rules import Rule, Rules

_FUSED = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
"""Kernels that hold a whole module: their attention cannot be taken over."""


class _Taking(TorchFunctionMode):
    """Take calls of attention over, by rules."""

    def __init__(self, rules: Rules, infos: list[AttentionInfo] | None) -> None:
        super().__init__()
        self._rules = rules
        self.infos = infos
        self._taken = 0
        # Layers of the calls inside of each checkpoint, in order.
        self._layers: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()

    def _layer(self) -> str:
        """Return the name of the layer that calls."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take attention calls; let everything else pass."""
        kwargs = kwargs or {}
        if bypass.active:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._take(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Its own call of attention, inside, is not seen by this mode.
            call = MultiHead(*args, **kwargs)
            reason = call.reason()
            if reason is None:
                return call.forward(self._take), None
            return self._give(reason, func, *args, **kwargs)
        if func in _FUSED:
            return self._give(f"a fused module: {func.__name__}", func, *args, **kwargs)
        return func(*args, **kwargs)

    def _take(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self._layer()
        self._taken += 1
        if not torch.compiler.is_compiling():
            for checkpoint in checkpoints():
                self._inside(checkpoint).append(layer)
        return self._rules.attention(layer, *args, **kwargs, into=self.infos)

    def _give(self, reason: str, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Let PyTorch compute, visibly."""
        self._taken += 1
        info, out = fall_back(
            partial(func, *args, **kwargs), reason, self._rules.strict, self._layer()
        )
        if self.infos is not None and not torch.compiler.is_compiling():
            self.infos.append(info)
        return out

    def _inside(self, checkpoint: Checkpoint) -> list[str]:
        """Return the layers that called inside of a checkpoint, which it will repeat."""
        layers = self._layers.get(checkpoint.owner)
        if layers is None:
            layers = self._layers[checkpoint.owner] = []
            checkpoint.repeat_in(partial(_Repeated, self._rules, layers))
        return layers


class _Repeated(_Taking):
    """The same calls once more: of the same layers, by the same rules; nobody reads infos."""

    def __init__(self, rules: Rules, layers: list[str]) -> None:
        super().__init__(rules, None)
        self._left = iter(layers)

    def _layer(self) -> str:
        return next(self._left, "")


class _Names(threading.local):
    def __init__(self) -> None:
        self.stack: list[str] = []


class enable(_Taking):  # noqa: N801 -- used like a function
    """Let `torch.nn.functional.scaled_dot_product_attention` keep a budget in this context.

    The context holds for the calling thread; contexts nest, the innermost decides. Calls that
    no backend can do go to PyTorch, visibly (see `scaled_dot_product_attention`).
    `torch.nn.MultiheadAttention` is taken over too, where it is asked for no weights. What
    activation checkpointing repeats in the backward pass is decided as it was in the context.

    Parameters
    ----------
    budget, policy, backend
        For calls that no rule matches; see `adaattn_core.attention`.
    rules : iterable of Rule
        The first that matches a layer, phase and head decides.
    model : torch.nn.Module, optional
        Its modules' names are what rules match and infos state. Without it every name is "".
    strict : bool
        Raise instead of falling back, and at the end if no attention was seen.

    Raises
    ------
    UnsupportedError
        With `strict`.

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
        last = Rule(budget=budget, policy=policy, backend=backend)
        super().__init__(Rules((*rules, last), strict), [])
        self.infos: list[AttentionInfo]
        self.model = model
        self._names = _Names()
        self._hooks: list[Any] = []

    def __enter__(self) -> enable:
        """Begin; names of the model's modules are followed from here on."""
        self.infos, self._taken = [], 0
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
        if self._rules.strict and not self._taken and exception[:1] in ((), (None,)):
            raise UnsupportedError(
                got="a block in which no attention was seen, with strict=True",
                needed="a call of PyTorch's function or nn.MultiheadAttention in this thread",
                do="scripted models and kernels called by name cannot be taken over: call"
                " PyTorch's function there",
            )

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

    def _layer(self) -> str:
        return self._names.stack[-1] if self._names.stack else ""
