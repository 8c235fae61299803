"""PyTorch: scaled dot product attention to a stated tolerance, as function, mode and module."""

from adaattn_torch import compat
from adaattn_torch.bridge import Attended, attend
from adaattn_torch.functional import scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, FallbackWarning, listening
from adaattn_torch.mode import Rule, enable
from adaattn_torch.modules import AdaptiveAttention, convert

__all__ = [
    "AdaptiveAttention",
    "Attended",
    "AttentionInfo",
    "FallbackWarning",
    "Rule",
    "attend",
    "compat",
    "convert",
    "enable",
    "listening",
    "scaled_dot_product_attention",
]
