"""Signatures of other libraries, by the name under which they are imported."""

from adaattn_torch.entries.compat import flash_attn_func, flash_attn_varlen_func, sageattn

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "sageattn"]
