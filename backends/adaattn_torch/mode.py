"""enable(): a context in which PyTorch's attention function keeps a budget, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name
from torch.overrides import TorchFunctionMode

from adaattn_core.backend import Backend
from adaattn_core.budget import ErrorBudget
from adaattn_core.policies.base import Policy
from adaattn_torch.functional import bypass
from adaattn_torch.info import AttentionInfo
from adaattn_torch.rules import Rule, Rules


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
        last = Rule(budget=budget, policy=policy, backend=backend)
        self._rules = Rules((*rules, last), strict)
        self.model = model
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
        layer = self._names.stack[-1] if self._names.stack else ""
        return self._rules.attention(layer, *args, **kwargs, into=self.infos)
