"""PyTorch: scaled dot product attention to a stated tolerance, as function, mode and module."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaattn_torch import compat
    from adaattn_torch.bridge import Attended, attend
    from adaattn_torch.cache.cache import AdaptiveCache
    from adaattn_torch.entries.flash import register_flash_attention
    from adaattn_torch.entries.mode import enable
    from adaattn_torch.entries.modules import AdaptiveAttention, convert
    from adaattn_torch.entries.transformers import budgets, register_transformers
    from adaattn_torch.functional import scaled_dot_product_attention
    from adaattn_torch.info import AttentionInfo, FallbackWarning, listening
    from adaattn_torch.masks.flex_blocks import import_block_mask
    from adaattn_torch.report import ModelReport, calibrate, model_report
    from adaattn_torch.rules import Rule

__all__ = [
    "AdaptiveAttention",
    "AdaptiveCache",
    "Attended",
    "AttentionInfo",
    "FallbackWarning",
    "ModelReport",
    "Rule",
    "attend",
    "budgets",
    "calibrate",
    "compat",
    "convert",
    "enable",
    "import_block_mask",
    "listening",
    "model_report",
    "register_flash_attention",
    "register_transformers",
    "scaled_dot_product_attention",
]

_LATE = {
    "AdaptiveAttention": "entries.modules",
    "AdaptiveCache": "cache.cache",
    "Attended": "bridge",
    "AttentionInfo": "info",
    "FallbackWarning": "info",
    "ModelReport": "report",
    "Rule": "rules",
    "attend": "bridge",
    "budgets": "entries.transformers",
    "calibrate": "report",
    "convert": "entries.modules",
    "enable": "entries.mode",
    "import_block_mask": "masks.flex_blocks",
    "listening": "info",
    "model_report": "report",
    "register_flash_attention": "entries.flash",
    "register_transformers": "entries.transformers",
    "scaled_dot_product_attention": "functional",
}


def __getattr__(name: str) -> Any:
    """Import a name where it is first asked for: the plugin's manifest needs no PyTorch."""
    if name == "compat":
        return import_module("adaattn_torch.compat")
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"adaattn_torch.{_LATE[name]}"), name)
    return found
