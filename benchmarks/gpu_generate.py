"""SmolLM2's decode steps over pages on a GPU: agreement, perplexity, a needle; in bf16.

    python benchmarks/gpu_generate.py --weights SMOL.gguf --tokens prose.npy code.npy

Every kind continues the same prompt, which PyTorch attends to: what is measured is decoding,
by the kernel that reads the pages. Perplexity is that of the text's own next tokens, given one
at a time; the needle is twelve drawn tokens behind eight others, said again at the end.
Tokens come from gpu_tokens.py; what generate.py says of a CPU in float32 this says of a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaattn_torch
from adaattn_torch import AdaptiveCache
from generate import greedy, nats, own, prefill, step
from smollm2_torch import read_gguf

PROMPT, GREEDY, FOLLOWING = 4096, 64, 256
BUDGET = 0.1
KINDS: dict[str, tuple[str, float]] = {
    "exact": ("exact", 0.0), "i8": ("i8", 0.0), "e4m3": ("e4m3", 0.0),
    "i8, skipping": ("i8", BUDGET / PROMPT),
}  # fmt: skip


def load(path: Path) -> Any:
    """Return transformers' model with the weights of a GGUF file, bf16 on the GPU."""
    meta, arrays = read_gguf([path])

    def fact(name: str) -> Any:
        return meta["llama." + name]

    config = LlamaConfig(
        vocab_size=arrays["token_embd.weight"].shape[0], hidden_size=fact("embedding_length"),
        intermediate_size=fact("feed_forward_length"), num_hidden_layers=fact("block_count"),
        num_attention_heads=fact("attention.head_count"),
        num_key_value_heads=fact("attention.head_count_kv"),
        max_position_embeddings=fact("context_length"),
        rms_norm_eps=fact("attention.layer_norm_rms_epsilon"), tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": fact("rope.freq_base")},
    )  # fmt: skip
    dim = config.hidden_size // config.num_attention_heads

    def halves(rows: np.ndarray) -> np.ndarray:
        # The file interleaves the two halves of a head's features.
        return rows.reshape(-1, dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": arrays["token_embd.weight"],
               "model.norm.weight": arrays["output_norm.weight"]}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for theirs, name in names.items():
            array = arrays[f"blk.{layer}.{theirs}.weight"]
            weights[f"model.layers.{layer}.{name}.weight"] = (
                halves(array) if theirs in ("attn_q", "attn_k") else array
            )
    model = LlamaForCausalLM(config)
    sent = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    missing = model.load_state_dict(sent, strict=False)
    if set(missing.missing_keys) - {"lm_head.weight"} or missing.unexpected_keys:
        raise SystemExit(f"not a model of this kind: {missing}")
    model.tie_weights()
    return model.cuda().bfloat16().eval()


def refilled(model: Any, prompt: Any, kind: str) -> Any:
    """Return a cache of a kind with the keys and values that a prompt left."""
    format, lam = KINDS[kind]
    cache = AdaptiveCache(model.config, format=format, lam=lam)
    for i, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def caches(model: Any, prompt: Any) -> Any:
    """Every kind's name, and what makes its cache anew; sets the attention that reads it."""
    yield "own", lambda: own(model, prompt)
    model.set_attn_implementation("adaattn")
    for kind in KINDS:
        yield kind, lambda kind=kind: refilled(model, prompt, kind)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def continued(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Agreement with greedy tokens over the own cache, and perplexity, by kind."""
    prompt, following = ids[:PROMPT], ids[PROMPT : PROMPT + FOLLOWING]
    cache, last = prefill(model, prompt)
    rows: dict[str, Any] = {}
    truth: list[int] = []
    for name, make in caches(model, cache):
        found = greedy(model, last.argmax(), make(), GREEDY)
        truth = truth or found
        mine = make()
        loss = nats(model, last.float(), following, mine)
        rows[name] = {
            "agreement": sum(a == b for a, b in zip(found, truth, strict=True)) / GREEDY,
            "perplexity": math.exp(loss),
        }
        if name != "own":
            rows[name]["footprint"] = mine.footprint()["ratio"]
            if not mine.report().heads[0].steps:
                raise SystemExit(f"{name}: no step read the pages")
    return rows


@torch.no_grad()
def needle(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Nats a token of what stood behind a mark, by kind."""
    generator = torch.Generator().manual_seed(1)
    mark, hidden = (
        torch.randint(1000, 40_000, (n,), generator=generator).to(ids) for n in (8, 12)
    )
    split, room = int(0.2 * PROMPT), PROMPT - 20
    before = torch.cat([ids[:split], mark, hidden, ids[split:room]])
    cache, _ = prefill(model, before)
    rows = {}
    for name, make in caches(model, cache):
        mine = make()
        last = step(model, mark, mine)[-1]
        rows[name] = nats(model, last.float(), hidden, mine)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokens", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    adaattn_torch.register_transformers()
    model = load(options.weights)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "prompt": PROMPT,
                              "greedy": GREEDY, "following": FOLLOWING}  # fmt: skip
    texts = {
        path.stem: torch.from_numpy(np.load(path).astype(np.int64)).cuda()
        for path in options.tokens
    }
    for name, ids in texts.items():
        report[name] = continued(model, ids)
        print(name, json.dumps(report[name], indent=1), flush=True)
    report["needle"] = needle(model, next(iter(texts.values())))
    print("needle", report["needle"], flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
