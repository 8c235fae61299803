"""SmolLM2's `generate` over an 8-bit cache: greedy agreement, perplexity, a needle (CPU).

    python benchmarks/generate.py PROSE.txt CODE.py --tokens 4096

Every format continues the same prompt, which is attended to in float32 whatever the cache: what
is measured is decoding. Perplexity is that of the text's own next tokens, given one at a time
to the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import smollm2
from adaattn_torch import AdaptiveCache
from quality import CODE, NEEDLE, QUESTION

FORMATS = ("exact", "i8", "e4m3")


def refilled(model: Any, prompt: Any, format: str) -> Any:
    """Return a cache of a format with the keys and values that a prompt left."""
    cache = AdaptiveCache(model.config, format=format)
    for i, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def own(model: Any, prompt: Any) -> Any:
    """Return transformers' own cache, refilled in the same way."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(prompt.layers):
        cache.update(layer.keys, layer.values, i)
    return cache


@torch.no_grad()
def step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of some tokens behind a cache, which then holds them too."""
    return model(ids[None], past_key_values=cache, use_cache=True).logits[0]


def greedy(model: Any, first: torch.Tensor, cache: Any, count: int) -> list[int]:
    """Tokens that are the most likely ones, one after the other."""
    token, found = first, []
    for _ in range(count):
        found.append(int(token))
        token = step(model, token.reshape(1), cache)[-1].argmax()
    return found


def nats(model: Any, last: torch.Tensor, ids: torch.Tensor, cache: Any) -> float:
    """Mean negative log-likelihood of tokens; `last` are the logits before the first."""
    total = 0.0
    for token in ids:
        total -= float(torch.log_softmax(last, -1)[token])
        last = step(model, token.reshape(1), cache)[-1]
    return total / len(ids)


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return transformers' cache of a prompt, and the logits after it."""
    cache = DynamicCache(config=model.config)
    logits = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[0, -1]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    tokenizer, model = smollm2.load()
    report: dict[str, Any] = {"tokens": args.tokens, "greedy_tokens": args.greedy}
    for path in args.texts:
        text = path.read_text(errors="ignore")[: args.tokens * 8]
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        prompt, following = ids[: args.tokens], ids[args.tokens : args.tokens + args.following]
        cache, last = prefill(model, prompt)
        rows = report[path.stem] = {}
        truth = greedy(model, last.argmax(), own(model, cache), args.greedy)
        base = nats(model, last, following, own(model, cache))
        for format in FORMATS:
            started = time.perf_counter()
            mine = refilled(model, cache, format)
            found = greedy(model, last.argmax(), mine, args.greedy)
            same = [a == b for a, b in zip(found, truth, strict=True)]
            rows[format] = {
                "agreement": sum(same) / len(same),
                "first_difference": same.index(False) if False in same else None,
                "footprint": mine.footprint()["ratio"],  # the newest page is float32 here
                "wide_heads": sum(h.format == "16-bit" for h in mine.report().heads),
                "perplexity": math.exp(
                    nats(model, last, following, refilled(model, cache, format))
                ),
                "perplexity_own": math.exp(base),
                "seconds": time.perf_counter() - started,
            }
            print(path.stem, format, rows[format], flush=True)
    text = args.texts[0].read_text(errors="ignore")[: args.tokens * 8]
    prose = tokenizer(text, return_tensors="pt")["input_ids"][0]
    hidden, question, answer = (
        tokenizer(x, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        for x in (NEEDLE, QUESTION, f" {CODE}")
    )
    room = args.tokens - len(hidden) - len(question)
    split = int(0.2 * room)
    before = torch.cat([prose[:split], hidden, prose[split:room]])
    cache, _ = prefill(model, before)  # the question is read through the cache
    rows = report["needle"] = {}
    for name in ("own", *FORMATS):
        mine = own(model, cache) if name == "own" else refilled(model, cache, name)
        last = step(model, question, mine)[-1]
        rows[name] = nats(model, last, answer, mine)
        print("needle", name, rows[name], flush=True)
    return report


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--greedy", type=int, default=64)
    parser.add_argument("--following", type=int, default=192)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    report = measure(args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
