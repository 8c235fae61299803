"""Forward: one call to a backend and back, by the shortest way that it allows.

A backend that `adaattn_core.backend.Forwards` has a short way: what ``run`` computes under the
plan of `ExactPolicy`, bit for bit, without statistics, facts or a certificate. What it does not
take it refuses by `UnsupportedError`; the call then goes the ordinary way. Calls go this short
way only where nobody could look at a certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adaattn_core import attention
from adaattn_core.backend import Backend, Forwards
from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plugins.registry import Registry, default_registry, get_backend
from adaattn_torch.arrays import from_backend, in_order_of, to_backend
from adaattn_torch.call import Asked, Call
from adaattn_torch.info import AttentionInfo, announce, is_heard

Forward = Callable[..., tuple[Any, Any]]
Computed = tuple[torch.Tensor, torch.Tensor, AttentionInfo | None]
"""Output, lse, and an info where there is one."""

_found: dict[tuple[str, str], Backend] = {}
_forwards: dict[tuple[str, torch.device], Forward | None] = {}
_found_in: list[Registry] = []


def backend_for(backend: Backend | str, kind: str) -> Backend:
    """Return the backend of a name for tensors on a kind of device; looked up once.

    Even a look into the registry takes longer than it should before a small attention.

    Raises
    ------
    BackendUnavailableError
        As `adaattn_core.plugins.registry.get_backend`; that is not remembered.
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
    return backend.forward if isinstance(backend, Forwards) else None


def _rules(call: Call) -> dict[str, Any]:
    """Score rules of a call, as backends take them: sinks in float32, or float64 on a CPU."""
    rules: dict[str, Any] = {}
    if call.softcap is not None:
        rules["softcap"] = call.softcap
    if call.sinks is not None:
        wide = call.sinks.dtype == torch.float64 and not call.query.is_cuda
        sinks = call.sinks if wide else call.sinks.to(torch.float32)
        rules["sinks"] = to_backend(sinks.contiguous())
    return rules


def _known_rules(backend: Backend | str, device: torch.device) -> set[str]:
    """Names of the score rules that a backend's short way takes."""
    return {name for name, _ in backend_for(backend, device.type).capabilities().rules}


def run(call: Call, want_info: bool) -> Computed:
    """Compute, without a gradient; the output has the query's order of strides.

    Parameters
    ----------
    call : Call
    want_info : bool
        False lets an exact call that nobody listens to go without a certificate, where the
        backend offers that; the output is the same.

    Returns
    -------
    out : Tensor, shape (batch, heads_q, len_q, dim_v)
    lse : Tensor of float32, shape (batch, heads_q, len_q)
    info : AttentionInfo or None

    Raises
    ------
    AdaAttnError
        What `adaattn_core.attention` raises.
    """
    query, key, value, allowed, bias, mask, scale, asked = call[:8]
    rules = _rules(call) if call.is_ruled else {}
    if allowed is not None:
        mask = mask & Mask.boolean(to_backend(allowed))
    if bias is not None:
        mask = mask & Mask.additive(to_backend(bias))
    arrays = to_backend(query), to_backend(key), to_backend(value)
    if not want_info and asked.is_exactness and not is_heard():
        forward = forward_for(asked.backend, query.device)
        knows = not rules or rules.keys() <= _known_rules(asked.backend, query.device)
        if forward is not None and knows:
            try:
                out, lse = forward(*arrays, mask=mask, scale=scale, **rules)
            except UnsupportedError:
                pass  # the ordinary way does it, or says why not
            else:
                return in_order_of(query, from_backend(out)), from_backend(lse), None
    result = attention(
        *arrays,
        mask=mask,
        scale=scale,
        **rules,
        budget=asked.budget,
        policy=asked.policy,
        plan=asked.plan,
        backend=asked.backend if rules else _backend_of(asked, query.device.type),
        seed=asked.seed,
        layer=asked.layer,
    )
    info = AttentionInfo.of_result(result, asked.layer)
    announce(info)
    return in_order_of(query, from_backend(result.out)), from_backend(result.lse), info


def _backend_of(asked: Asked, kind: str) -> Backend | str:
    """Return the backend; a name where what it is depends on a plan or a policy."""
    if asked.plan is None and asked.policy is None:
        return backend_for(asked.backend, kind)
    return asked.backend
