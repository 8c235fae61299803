"""SmolLM2's forward pass in torch alone, from its GGUF file: no transformers, no tokenizer.

For machines where nothing can be installed. Past the length that the model was trained for,
positions are stretched by YaRN (arXiv:2309.00071) with the constants of its paper, as
transformers does it: `inverse_frequencies`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- its usual name

BETA_FAST, BETA_SLOW = 32, 1
"""Rotations over the trained length: above the first a frequency stays, below the second it is
divided by the stretch (YaRN, section 3.2)."""

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer number and rotated q, k, v of shape (heads, len, dim) -> output of q's shape."""


# --- the file ---------------------------------------------------------------------------------
class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
        return self.number((codes | {10: "Q", 11: "q", 12: "d"})[kind])


def _half(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view("<f2").astype(np.float32)


def _f32(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, "<f4")


def _q4_1(raw: bytes) -> np.ndarray:
    """32 weights: step and minimum in f16; 16 bytes, the first 16 weights in low nibbles."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 20)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles.astype(np.float32) * _half(blocks[:, :2]) + _half(blocks[:, 2:4])


def _q8_0(raw: bytes) -> np.ndarray:
    """32 weights: step in f16, then 32 signed bytes."""
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 34)
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks[:, :2])


# ggml type -> (weights, bytes) of a block, and what turns blocks into float32
_TYPES = {0: (1, 4, _f32), 3: (32, 20, _q4_1), 8: (32, 34, _q8_0)}


def read_gguf(parts: Iterable[Path]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and dequantised tensors of a GGUF file, which may lie in several parts."""
    reader = _Reader(b"".join(part.read_bytes() for part in parts))
    if reader.data[:4] != b"GGUF":
        raise SystemExit("not a GGUF file, or its parts are out of order")
    reader.at = 8  # after the version
    tensors, pairs = reader.number("Q"), reader.number("Q")
    meta: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text()
        meta[key] = reader.value(reader.number("I"))
    places = []
    for _ in range(tensors):
        name = reader.text()
        shape = [reader.number("Q") for _ in range(reader.number("I"))]
        places.append((name, shape[::-1], reader.number("I"), reader.number("Q")))
    align = meta.get("general.alignment", 32)
    base = -(-reader.at // align) * align
    found = {}
    for name, shape, kind, offset in places:
        weights, size, decode = _TYPES[kind]
        end = base + offset + math.prod(shape) // weights * size
        found[name] = decode(reader.data[base + offset : end]).reshape(shape)
    return meta, found


# --- the model --------------------------------------------------------------------------------
def inverse_frequencies(
    dim: int, base: float, trained: int, stretch: float
) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of features, and the factor on cos and sin.

    Parameters
    ----------
    dim, base : int, float
        Of the rotary embedding.
    trained : int
        Positions that the model was trained for.
    stretch : float
        1 for the embedding as trained; otherwise YaRN's scale, length over `trained`.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    kept = 1.0 / base**exponents
    if stretch <= 1:
        return kept, 1.0

    def pair(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(BETA_FAST)), 0)
    high = min(math.ceil(pair(BETA_SLOW)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)
    return kept / stretch * ramp + kept * (1 - ramp), 0.1 * math.log(stretch) + 1.0


@dataclass
class Model:
    """Weights on a device, with the sizes that the file states."""

    weights: dict[str, torch.Tensor]
    layers: int
    heads_q: int
    heads_kv: int
    trained: int
    rope_base: float
    epsilon: float

    @classmethod
    def load(cls, parts: Iterable[Path], device: str, dtype: torch.dtype) -> Model:
        """Read a llama-like GGUF file."""
        meta, arrays = read_gguf(parts)
        return cls(
            weights={
                name: torch.tensor(array).to(device, dtype) for name, array in arrays.items()
            },
            layers=meta["llama.block_count"],
            heads_q=meta["llama.attention.head_count"],
            heads_kv=meta["llama.attention.head_count_kv"],
            trained=meta["llama.context_length"],
            rope_base=meta["llama.rope.freq_base"],
            epsilon=meta["llama.attention.layer_norm_rms_epsilon"],
        )

    def rotation(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, shape (length, dim / 2), stretched past the trained length."""
        embedding = self.weights["token_embd.weight"]
        frequencies, factor = inverse_frequencies(
            embedding.shape[1] // self.heads_q, self.rope_base, self.trained,
            length / self.trained,
        )  # fmt: skip
        angles = torch.outer(torch.arange(length).float(), frequencies).to(embedding.device)
        return angles.cos() * factor, angles.sin() * factor

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weights[name + "_norm.weight"]

    def hidden(self, ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Last hidden states, shape (len, width), of token numbers, shape (len,)."""
        weights = self.weights
        cos, sin = self.rotation(len(ids))

        def heads(x: torch.Tensor, count: int) -> torch.Tensor:
            return x.view(len(ids), count, -1).transpose(0, 1)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            # The file interleaves the two halves of the features; the model rotates halves.
            first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            pair = (first * cos - second * sin, second * cos + first * sin)
            return torch.cat(pair, dim=-1).to(x.dtype)

        x = weights["token_embd.weight"][ids]
        for layer in range(self.layers):
            at = f"blk.{layer}."
            inner = self._norm(x, at + "attn")
            q, k, v = (
                heads(F.linear(inner, weights[at + f"attn_{name}.weight"]), count)
                for name, count in zip(
                    "qkv", (self.heads_q, self.heads_kv, self.heads_kv), strict=True
                )
            )
            out = attention(layer, rotated(q), rotated(k), v).transpose(0, 1).flatten(1)
            x = x + F.linear(out, weights[at + "attn_output.weight"])
            inner = self._norm(x, at + "ffn")
            gate = F.silu(F.linear(inner, weights[at + "ffn_gate.weight"]))
            up = F.linear(inner, weights[at + "ffn_up.weight"])
            x = x + F.linear(gate * up, weights[at + "ffn_down.weight"])
        return self._norm(x, "output")

    def losses(self, hidden: torch.Tensor, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Nats of each next token, in pieces."""
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        for start in range(0, len(ids) - 1, 2048):
            stop = min(start + 2048, len(ids) - 1)
            logits = F.linear(hidden[start:stop], head).float()
            yield F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none")
