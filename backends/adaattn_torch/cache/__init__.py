"""A cache of keys and values for transformers' ``generate``, on pages of 16 or 8 bits."""
