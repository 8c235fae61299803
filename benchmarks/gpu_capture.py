r"""Capture long queries, keys and values of SmolLM2 on a GPU, with torch alone.

    python benchmarks/gpu_capture.py --weights PART ... --tokens prose.npy \
        --lengths 8192 32768 131072 --out DIR

Writes DIR/qkv-LEN-TEXT.pt (torch.save): for each layer q (heads_q, len, 64), k and v
(heads_kv, len, 64) in bf16, after the rotary embedding, stretched by YaRN past the length that
the model was trained for; the perplexity of these weights on this text, so that a stretch which
breaks the model is seen. PARTs are the GGUF file of smollm2.py, whole or cut into pieces;
tokens come from gpu_tokens.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smollm2_torch import Model

LAYERS = tuple(range(1, 30, 4))


def capture(model: Model, ids: torch.Tensor, layers: tuple[int, ...]) -> dict[str, Any]:
    """Run the model once and keep the inputs of some layers' attention."""
    taken: dict[int, dict[str, torch.Tensor]] = {}
    group = model.heads_q // model.heads_kv

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if layer in layers:
            arrays = {"q": q, "k": k, "v": v}
            taken[layer] = {n: x.to("cpu", torch.bfloat16) for n, x in arrays.items()}
            taken[layer] = {n: x.contiguous() for n, x in taken[layer].items()}
        wide = (x.repeat_interleave(group, dim=0)[None] for x in (k, v))
        compute = torch.nn.functional.scaled_dot_product_attention
        return compute(q[None], *wide, is_causal=True)[0]

    with torch.inference_mode():
        hidden = model.hidden(ids, attention)
        nats = torch.cat(list(model.losses(hidden, ids))).mean()
    return {"len": len(ids), "perplexity": float(nats.exp()), "layers": taken}


def main() -> None:
    """Capture every text at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", type=Path, required=True)
    parser.add_argument("--tokens", nargs="+", type=Path, required=True)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = Model.load(options.weights, options.device, dtype)
    for path in options.tokens:
        ids = torch.from_numpy(np.load(path)).long().to(options.device)
        for length in options.lengths:
            started = time.perf_counter()
            taken = capture(model, ids[:length], tuple(options.layers))
            torch.save(taken, options.out / f"qkv-{length}-{path.stem}.pt")
            seconds = time.perf_counter() - started
            print(
                f"{path.stem} {length}: perplexity {taken['perplexity']:.2f}, {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
