"""Real heads: two layers of SmolLM2-135M-Instruct that the package ships for its demo."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core import Mask
from adaattn_core.cli.inputs import read_inputs

Float = NDArray[np.floating[Any]]
LAYERS = (9, 16)
HEADS = 3


@dataclass(frozen=True)
class Head:
    """One head: arrays of shape (1, 1, len, dim), and its scale.

    Attributes
    ----------
    name : str
        For titles.
    """

    name: str
    query: Float
    key: Float
    value: Float
    scale: float

    def arguments(self) -> dict[str, Any]:
        """What `attention` takes besides the arrays."""
        return {"mask": Mask.causal(), "scale": self.scale, "backend": "numpy"}

    def scores(self, rows: slice, keys: slice) -> NDArray[np.float64]:
        """Scaled scores without a mask, in float64."""
        query = self.query[0, 0, rows].astype(np.float64)
        return np.asarray(self.scale * query @ self.key[0, 0, keys].astype(np.float64).T)


def head(layer: int, number: int, length: int | None = None) -> Head:
    """Head `number` of a shipped layer, its first `length` tokens."""
    name = f"smollm2_layer{layer:02d}.npz"
    with as_file(files("adaattn_core").joinpath("demo_data", name)) as path:
        inputs = read_inputs(path)
    query, key, value = (
        np.asarray(x, np.float32)[None, :, :length]
        if x.ndim == 3
        else np.asarray(x, np.float32)[:, :, :length]
        for x in (inputs.query, inputs.key, inputs.value)
    )
    return Head(
        f"SmolLM2-135M layer {layer}, head {number}",
        query[:, number : number + 1],
        key,
        value,
        float(inputs.scale),
    )


def all_heads(length: int | None = None) -> list[Head]:
    """Every shipped head."""
    return [head(layer, number, length) for layer in LAYERS for number in range(HEADS)]
