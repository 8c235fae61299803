"""PyTorch: scaled dot product attention to a stated tolerance, as function, mode and module."""

from adaattn_torch.bridge import Attended, attend
from adaattn_torch.functional import scaled_dot_product_attention
from adaattn_torch.info import AttentionInfo, FallbackWarning, listening

__all__ = [
    "Attended",
    "AttentionInfo",
    "FallbackWarning",
    "attend",
    "listening",
    "scaled_dot_product_attention",
]
