"""Who watches a call: tracers and compilers, transforms, forward-mode differentiation.

Values computed past the dispatcher are constants to a tracer and have no derivatives but those
that they are given, so a call must know. Every line here is in the host time of every call.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from adaattn_core.errors import UnsupportedError

TRANSFORM = "a torch.func transform (vmap, grad, jvp)"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_dispatch_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
transforms = torch._C._functorch.peek_interpreter_stack


def is_recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether somebody watches at the dispatcher: compilers, tracers, fake tensors, counters.

    They must see an operator.
    """
    if is_compiling():
        return True
    if not type(query) is type(key) is type(value) is torch.Tensor:
        plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN
        if not plain:
            return True
    return query.is_meta or _dispatch_modes() > 0 or _tracing() is not None


def in_forward_mode() -> bool:
    """Whether inputs may carry tangents."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether any torch.func transform is active; see `is_transformed`."""
    return transforms() is not None


# While a transform is traced, a compiler is inside of it: it asks once.
torch.compiler.assume_constant_result(in_transform)  # type: ignore[no-untyped-call]


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether a torch.func transform wraps any of the tensors."""
    if is_compiling():
        return in_transform()
    return transforms() is not None and any(_is_wrapped(x) for x in tensors if x is not None)


def refuse_transform() -> NoReturn:
    """Raise for a torch.func transform where PyTorch's function cannot take over."""
    raise UnsupportedError(
        got=TRANSFORM,
        needed="tensors that no transform wraps",
        do="call adaattn_torch.scaled_dot_product_attention: PyTorch then takes such calls",
    )
