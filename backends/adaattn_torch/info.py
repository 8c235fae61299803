"""AttentionInfo: what is known about one call; who listens to it; the fallback that is seen."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from adaattn_core.certificates.data import Certificate
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RunFacts
from adaattn_core.plan import Plan
from adaattn_core.problem import HeadIndex
from adaattn_core.result import AttentionResult
from adaattn_core.stats import ProblemStats


class FallbackWarning(UserWarning):
    """A call went to PyTorch's own attention; given once per reason and process."""


@dataclass(frozen=True, slots=True)
class AttentionInfo:
    """What is known about one call, without its arrays.

    Attributes
    ----------
    plan : Plan or None
        What ran; None after a fallback.
    certificate : Certificate or None
        None after a fallback: PyTorch's kernels give no certificate.
    provenance : mapping of str to object
        What computed the output.
    stats : ProblemStats or None
        What was measured, if anything.
    facts : mapping of (sequence, head) to RunFacts
    fell_back : str or None
        Why PyTorch computed the output instead; None where it did not.
    layer : str
        Name of the layer, or "".
    heads : tuple of int or None
        Query heads that the info speaks of, in order; None for all of them.
    """

    plan: Plan | None = None
    certificate: Certificate | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stats: ProblemStats | None = None
    facts: Mapping[HeadIndex, RunFacts] = field(default_factory=dict)
    fell_back: str | None = None
    layer: str = ""
    heads: tuple[int, ...] | None = None

    @classmethod
    def of_result(cls, result: AttentionResult, layer: str) -> AttentionInfo:
        """Keep everything of a result but its arrays."""
        return cls(
            plan=result.plan,
            certificate=result.certificate,
            provenance=result.provenance,
            stats=result.stats,
            facts=result.facts,
            layer=layer,
        )

    @classmethod
    def of_fallback(cls, reason: str, layer: str) -> AttentionInfo:
        """State that PyTorch's own attention computed the output, and why."""
        return cls(provenance={"backend": "torch", "fell_back": reason}, fell_back=reason,
                   layer=layer)  # fmt: skip


class _Bypass(threading.local):
    """Whether this thread is inside a fallback: enabled modes then let calls pass."""

    active = False


bypass = _Bypass()


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[AttentionInfo]] = []


_listeners = _Listeners()
_warned: set[str] = set()


@contextmanager
def listening(into: list[AttentionInfo]) -> Iterator[list[AttentionInfo]]:
    """Append the info of every call of this thread to a list."""
    _listeners.lists.append(into)
    try:
        yield into
    finally:
        # By identity: two lists that are equal are still two listeners.
        index = next(i for i, x in enumerate(_listeners.lists) if x is into)
        del _listeners.lists[index]


def is_heard() -> bool:
    """Whether anybody listens in this thread."""
    return bool(_listeners.lists)


def announce(info: AttentionInfo) -> None:
    """Tell the listeners of this thread."""
    for listener in _listeners.lists:
        listener.append(info)


def warn_of_fallback(reason: str) -> None:
    """Warn, once per reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"PyTorch computes this attention, exactly and without a certificate: {reason}"
            " (said once; strict=True makes it an error)",
            FallbackWarning,
            stacklevel=4,
        )


def refuse(reason: str) -> NoReturn:
    """Raise what ``strict=True`` makes of a call that PyTorch would have to compute."""
    raise UnsupportedError(
        got=reason,
        needed="a call that a backend computes itself, because strict=True",
        do="change the call, or leave strict out to let PyTorch compute it",
    )


def fall_back(
    compute: Callable[[], Any], reason: str, strict: bool, layer: str
) -> tuple[AttentionInfo, Any]:
    """Let PyTorch compute, and say so: a warning, and an info to the listeners.

    Parameters
    ----------
    compute : callable
        Returns what PyTorch computes; enabled modes let its calls pass.
    reason : str
    strict : bool
        Refuse instead.
    layer : str

    Returns
    -------
    (AttentionInfo, object)
        The info, and what `compute` returned.

    Raises
    ------
    UnsupportedError
        If `strict`.
    """
    if strict:
        refuse(reason)
    info = AttentionInfo.of_fallback(reason, layer)
    if torch.compiler.is_compiling():
        warn_of_fallback(reason)
        return info, compute()
    before, bypass.active = bypass.active, True
    try:
        outputs = compute()
    finally:
        bypass.active = before
    warn_of_fallback(reason)  # after: what PyTorch refuses is its error, and no fallback
    announce(info)
    return info, outputs


def forget_warnings() -> None:
    """Let every reason be warned of again."""
    _warned.clear()
