"""The short way to a backend: found once, and asked for exact attention without a certificate.

A backend may offer, beside the protocol of `adaattn_core.backend.Backend`, one method::

    forward(query, key, value, *, mask: Mask, scale: float) -> (out, lse)

with the arrays that its ``run`` takes. It computes what ``run`` computes under the plan of
`ExactPolicy`, bit for bit, and builds neither statistics nor facts nor a certificate. What it
does not take it refuses by `UnsupportedError`; the call then goes the ordinary way. Calls come
here only where nobody could look at a certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adaattn_core.backend import Backend
from adaattn_core.registry import Registry, default_registry, get_backend

Forward = Callable[..., tuple[Any, Any]]

_found: dict[tuple[str, str], Backend] = {}
_forwards: dict[tuple[str, torch.device], Forward | None] = {}
_found_in: list[Registry] = []


def backend_for(backend: Backend | str, kind: str) -> Backend:
    """Return the backend of a name for tensors on a kind of device; looked up once.

    The registry asks every backend's driver anew, which takes longer than a small attention.

    Raises
    ------
    BackendUnavailableError
        As `adaattn_core.registry.get_backend`; that is not remembered.
    """
    if not isinstance(backend, str):
        return backend
    registry = default_registry()
    if not _found_in or _found_in[0] is not registry:
        _found.clear()
        _forwards.clear()
        _found_in[:] = [registry]
    known = _found.get((backend, kind))
    if known is None:
        known = _found[backend, kind] = get_backend(backend, kind)
    return known


def forward_for(backend: Backend | str, device: torch.device) -> Forward | None:
    """Return the short way for tensors on a device, if there is a backend that offers one.

    Raises
    ------
    BackendUnavailableError
        As `backend_for`.
    """
    if not isinstance(backend, str):
        return forward_of(backend)
    known = bool(_found_in) and _found_in[0] is default_registry()
    if not known or (backend, device) not in _forwards:
        _forwards[backend, device] = forward_of(backend_for(backend, device.type))
    return _forwards[backend, device]


def forward_of(backend: Backend) -> Forward | None:
    """Return a backend's short way, if it offers one."""
    forward: Forward | None = getattr(backend, "forward", None)
    return forward
