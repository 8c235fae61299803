"""A cache of keys and values for transformers' ``generate``, on pages of 16 or 8 bits."""

from adaattn_torch.cache.cache import AdaptiveCache, CacheReport

__all__ = ["AdaptiveCache", "CacheReport"]
