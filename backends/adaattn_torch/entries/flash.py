"""PyTorch's own hook for flash attention kernels, `torch.nn.attention`'s registry of them.

Once activated, the kernel behind ``SDPBackend.FLASH_ATTENTION`` on CUDA is this library's exact
attention: `torch.nn.functional.scaled_dot_product_attention` itself, without a mode and without
an import in the model's code, and below PyTorch's own context parallelism. PyTorch sends there
only 16-bit tensors without a mask. The backward pass stays PyTorch's own kernel, which takes
our output and lse. What we do not compute goes to the kernel that was there before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adaattn_core.backend import Backend
from adaattn_core.errors import BackendUnavailableError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch.call import Asked, Call
from adaattn_torch.forward import run
from adaattn_torch.info import AttentionInfo, announce, warn_of_fallback

NAME = "AdaAttn"
"""Name to pass to `torch.nn.attention.activate_flash_attention_impl`."""

OPERATOR = "_scaled_dot_product_flash_attention"

Outputs = tuple[Any, ...]
"""out, lse, None, None, len_q, len_kv, rng_state, unused, debug_mask: the operator's nine."""


@dataclass
class Handle:
    """What keeps the kernel registered; torch's registry holds it while it is active."""

    library: torch.library.Library | None

    def remove(self) -> None:
        """Give the operator its previous kernel back."""
        self.library = None  # the library's finalizer unregisters


def register_flash_attention(backend: Backend | str = "auto") -> str:
    """Offer this library's kernels to PyTorch's flash attention; nothing is activated.

    Parameters
    ----------
    backend : Backend or str
        See `adaattn_core.attention`.

    Returns
    -------
    str
        The name for `torch.nn.attention.activate_flash_attention_impl`;
        `torch.nn.attention.restore_flash_attention_impl` takes it back.

    Raises
    ------
    BackendUnavailableError
        If this PyTorch has no such hook.

    Examples
    --------
    >>> import torch, adaattn_torch
    >>> name = adaattn_torch.register_flash_attention()
    >>> name in torch.nn.attention.list_flash_attention_impls()
    True
    """
    try:
        from torch.library import get_kernel  # noqa: F401, PLC0415
        from torch.nn.attention import (  # noqa: PLC0415 -- newer than the oldest torch
            register_flash_attention_impl,
        )
    except ImportError as error:
        raise BackendUnavailableError(
            got=f"PyTorch {torch.__version__}: {error}",
            needed="one with register_flash_attention_impl and torch.library.get_kernel",
            do="update PyTorch, or use adaattn_torch.enable(), which needs neither",
        ) from error
    register_flash_attention_impl(NAME, register_fn=partial(activate, backend=backend))
    return NAME


def activate(backend: Backend | str = "auto", key: str = "CUDA") -> Handle:
    """Register the kernel with PyTorch's dispatcher; PyTorch's registry calls this.

    Parameters
    ----------
    backend : Backend or str
    key : str
        Dispatch key that gets the kernel.

    Raises
    ------
    BackendUnavailableError
        If PyTorch has no kernel of its own there.
    """
    try:
        previous = torch.library.get_kernel(f"aten::{OPERATOR}", key)
    except RuntimeError as error:
        raise BackendUnavailableError(
            got=f"a PyTorch without a flash attention kernel for {key}",
            needed="one to hand back to what is not computed here: a build with CUDA",
            do="install such a build, or use adaattn_torch.enable()",
        ) from error
    library = torch.library.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
    kernel = partial(_kernel, backend, previous)
    library.impl(OPERATOR, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]
    return Handle(library)


def _kernel(
    backend: Backend | str,
    previous: Any,
    keys: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Outputs:
    """Compute ``aten::_scaled_dot_product_flash_attention``."""
    reason = _reason(query, key, value, dropout_p, is_causal, return_debug_mask, scale)
    if reason is None:
        mask = Mask.causal("top_left") if is_causal else Mask.none()
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        call = Call(query, key, value, None, None, mask, factor, Asked(backend=backend))
        try:
            out, lse, _ = run(call, want_info=False)
        except (UnsupportedError, BackendUnavailableError) as error:
            reason = f"{error.got}; needed {error.needed}"
        else:
            return (
                out, lse, None, None, query.shape[2], key.shape[2],
                # Random state that only dropout reads, and a debug mask that nobody asked for.
                query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64),
                query.new_empty(0),
            )  # fmt: skip
    warn_of_fallback(reason)
    announce(AttentionInfo.of_fallback(reason, ""))
    outputs: Outputs = previous.call_boxed(
        keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return outputs


def _reason(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> str | None:
    """Say why the previous kernel must take the call."""
    if dropout_p != 0.0:
        return "dropout"
    if return_debug_mask:
        return "a debug mask"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "other than four dimensions"
    if is_causal and query.shape[2] != key.shape[2]:
        # Flash kernels differ in where such a mask starts, and PyTorch's backward is one.
        return "a causal mask on different numbers of queries and keys"
    if scale is not None and not scale > 0:
        return f"scale={scale}"
    return None
