"""Contexts that hold again where activation checkpointing repeats a forward pass.

`torch.utils.checkpoint` runs a part of a model again during the backward pass, after the
context in which it ran is left. A context that changed what ran must then hold again: the
backward pass reads the repeated run's tensors in the order in which the first saved its own.
PyTorch has no public name for what a checkpoint repeats. The form without re-entrance keeps it
behind its hook for saved tensors, the other in its function's context, which is on the stack.

Should another PyTorch keep it elsewhere, a checkpoint without re-entrance fails
(`adaattn_torch.bridge` saves a tensor that PyTorch's own attention does not), and one with it
has the gradient of PyTorch's attention: no gradient is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import CheckpointFunction


class Checkpoint(NamedTuple):
    """What holds the function that is to be repeated, and under which name; a weak key."""

    owner: Any
    name: str

    def repeat_in(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Let a context, made anew each time, hold in what is repeated."""
        repeated = getattr(self.owner, self.name)

        def repeat(*args: Any) -> Any:
            with context():
                return repeated(*args)

        setattr(self.owner, self.name, repeat)


def checkpoints() -> list[Checkpoint]:
    """Return the checkpoints inside of which this thread runs."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    found = [_behind(pack) for pack, _ in hooks]
    if not torch.is_grad_enabled():  # as the form with re-entrance runs
        found += _on_the_stack()
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _behind(pack: Any) -> Checkpoint | None:
    """Return the checkpoint whose hook this is, if it is one's."""
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None
    for name, cell in zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True):
        if name == "frame" and hasattr(cell.cell_contents, "recompute_fn"):
            return Checkpoint(cell.cell_contents, "recompute_fn")
    return None


def _on_the_stack() -> list[Checkpoint | None]:
    forward = CheckpointFunction.forward.__code__
    found: list[Checkpoint | None] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is forward and hasattr(frame.f_locals.get("ctx"), "run_function"):
            found.append(Checkpoint(frame.f_locals["ctx"], "run_function"))
        frame = frame.f_back  # type: ignore[assignment]
    return found
