"""CompactMask: a boolean mask that travels as its pattern, and is written out when touched."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from adaattn_core.mask import Mask


class CompactMask(torch.Tensor):
    """A boolean mask of shape (batch, 1, len_q, len_kv) that is known by its pattern.

    True = may attend. Operations see the boolean tensor. One that could write to it, or return
    a view of it, turns this object into that tensor for good, so that pattern and values never
    part.

    Parameters
    ----------
    pattern : Mask
        Structural: window, alignment and key lengths.
    shape : (int, int, int, int)
    device : torch.device

    Attributes
    ----------
    pattern : Mask or None
        None once it has become a plain boolean tensor.
    """

    pattern: Mask | None
    _dense: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, pattern: Mask | None, shape: tuple[int, ...], device: torch.device
    ) -> CompactMask:
        """Make a tensor without storage."""
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        made.pattern, made._dense = pattern, None
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Say what it is without writing it out."""
        what = "written out" if self.pattern is None else self.pattern.describe()
        return f"CompactMask({what}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the boolean tensor."""
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the boolean tensor."""
        return self.dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """Return the boolean tensor as lists."""
        return self.dense().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the boolean tensor as an array."""
        return self.dense().numpy(force=force)

    def dense(self) -> torch.Tensor:
        """Return the boolean tensor, of shape (batch, 1, len_q, len_kv)."""
        if self._dense is not None:
            return self._dense
        assert self.pattern is not None
        return written_out(self.pattern, tuple(self.shape), self.device)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Become the boolean tensor: what a compiled graph takes is values."""
        self._write_out()
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], _: None, __: Any, ___: Any
    ) -> CompactMask:
        """Wrap a boolean tensor."""
        dense = inner["_dense"]
        made = CompactMask(None, tuple(dense.shape), dense.device)
        made._dense = dense
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let an operation have the boolean tensor."""
        lasting = any(a.alias_info is not None for a in func._schema.arguments)

        def give(mask: CompactMask) -> torch.Tensor:
            return mask._write_out() if lasting else mask.dense()

        args, kwargs = tree_map_only(CompactMask, give, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _write_out(self) -> torch.Tensor:
        self._dense = self.dense()
        self.pattern = None
        return self._dense


def written_out(pattern: Mask, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Write a structural mask out as a boolean tensor of shape (batch, 1, len_q, len_kv)."""
    batch, _, len_q, len_kv = shape
    row = torch.arange(len_q, device=device)[:, None]
    column = torch.arange(len_kv, device=device)
    allowed = torch.ones(1, 1, len_q, len_kv, dtype=torch.bool, device=device)
    ends = None
    if pattern.lengths is not None:
        ends = torch.tensor(pattern.lengths, device=device)[:, None, None, None]
        allowed = allowed & (column < ends)
    if pattern.alignment == "bottom_right":
        row = row + ((len_kv if ends is None else ends) - len_q)
    left, right = pattern.reach(len_q, len_kv)
    if right is not None:
        allowed = allowed & (column <= row + right)
    if left is not None:
        allowed = allowed & (column >= row - left)
    return allowed.expand(batch, 1, len_q, len_kv)
