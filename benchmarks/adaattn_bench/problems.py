"""What is computed: shipped real heads, a file's, or heads drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaattn_bench.devices import torch_module
from adaattn_core.cli.inputs import Inputs, read_inputs
from adaattn_core.errors import ArgumentError
from adaattn_core.mask import Mask

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DEMO_LAYERS = ("smollm2_layer09.npz", "smollm2_layer16.npz")
KINDS = ("demo", "local", "normal", "sink")
DRAWN = KINDS[1:]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one problem.

    Attributes
    ----------
    batch, heads_q, heads_kv, len_kv, dim : int
    len_q : int
        Rows: the last ones of the sequence.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_kv: int
    dim: int

    @property
    def visible(self) -> int:
        """Scores of one head under a causal mask whose last row sees every key."""
        hidden = self.len_kv - self.len_q
        return self.len_q * hidden + self.len_q * (self.len_q + 1) // 2

    @property
    def flops(self) -> float:
        """Floating point operations of both products, all visible scores computed."""
        return 4.0 * self.batch * self.heads_q * self.visible * self.dim

    def cache_bytes(self, item_bytes: int) -> int:
        """Bytes of keys and values."""
        return 2 * self.batch * self.heads_kv * self.len_kv * self.dim * item_bytes

    def traffic_bytes(self, item_bytes: int) -> int:
        """Bytes that any computation must move: query, key, value read once, output written."""
        rows = 2 * self.batch * self.heads_q * self.len_q * self.dim * item_bytes
        return rows + self.cache_bytes(item_bytes)


@dataclass(frozen=True, slots=True)
class Problem:
    """Causal attention of the last rows of a sequence.

    Attributes
    ----------
    name : str
        Where the arrays come from.
    query, key, value : ndarray, shape (batch, heads, len, dim)
        On the host, in the format that is measured.
    scale : float or None
    """

    name: str
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    scale: float | None

    @property
    def shape(self) -> Shape:
        """Sizes."""
        batch, heads_q, len_q, dim = self.query.shape
        return Shape(batch, heads_q, self.key.shape[1], len_q, self.key.shape[2], dim)

    @property
    def mask(self) -> Mask:
        """Causal, the last row at the last key."""
        return Mask.causal("bottom_right")

    def tensors(self, device: str) -> tuple[Any, Any, Any]:
        """Return the three as torch tensors on a device."""
        torch = torch_module()
        return tuple(_tensor(torch, x).to(device) for x in (self.query, self.key, self.value))


def _tensor(torch: Any, array: NDArray[Any]) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def make_problem(
    source: str, shape: Shape, dtype: str, *, seed: int = 0, layer: int = 0
) -> Problem:
    """Return a problem of the sizes asked for.

    Parameters
    ----------
    source : str
        ``demo``: the heads that come with the package; ``local``, ``normal``, ``sink``: drawn
        at random; else the path of a file that `adaattn run` reads.
    shape : Shape
        Of a file and of the demo the first keys are taken; sizes beyond theirs are refused.
    dtype : str
        A name in `DTYPES`.
    seed, layer : int

    Raises
    ------
    ArgumentError
        If the source does not have these sizes, or the format is unknown.
    FileError
        If the file cannot be read.
    """
    if dtype not in DTYPES:
        raise ArgumentError(
            got=f"--dtype {dtype}",
            needed=f"one of {', '.join(DTYPES)}",
            do="choose one of them",
        )
    if source in DRAWN:
        arrays = draw(source, shape, np.random.default_rng(seed))
        scale = None
    else:
        inputs = _demo(layer) if source == "demo" else read_inputs(Path(source))
        arrays, scale = _cut(source, inputs, shape), inputs.scale
    kept = [np.ascontiguousarray(x.astype(DTYPES[dtype])) for x in arrays]
    return Problem(source, kept[0], kept[1], kept[2], scale)


def sizes_of(source: str) -> tuple[int, int, int, int] | None:
    """Query heads, key/value heads, keys and dimension that a source has; None: any."""
    if source in DRAWN:
        return None
    inputs = _demo(0) if source == "demo" else read_inputs(Path(source))
    return inputs.query.shape[1], inputs.key.shape[1], *inputs.key.shape[2:]


def _demo(layer: int) -> Inputs:
    folder = files("adaattn_core").joinpath("demo_data")
    with as_file(folder.joinpath(DEMO_LAYERS[layer % len(DEMO_LAYERS)])) as path:
        return read_inputs(path)


def demo_inputs(tokens: int) -> Iterator[tuple[str, Inputs]]:
    """Yield layer and heads of the shipped data, its first tokens.

    Raises
    ------
    ArgumentError
        If it has fewer tokens.
    """
    for number, name in enumerate(DEMO_LAYERS):
        inputs = _demo(number)
        _, heads_q, _, dim = inputs.query.shape
        shape = Shape(1, heads_q, inputs.key.shape[1], tokens, tokens, dim)
        q, k, v = _cut("demo", inputs, shape)
        layer = name.removesuffix(".npz").removeprefix("smollm2_layer").lstrip("0")
        yield layer, replace(inputs, query=q, key=k, value=v)


def _cut(source: str, inputs: Inputs, shape: Shape) -> tuple[NDArray[Any], ...]:
    q, k, v = inputs.query, inputs.key, inputs.value
    has = (q.shape[1], k.shape[1], q.shape[3])
    wanted = (shape.heads_q, shape.heads_kv, shape.dim)
    if has != wanted or k.shape[2] < shape.len_kv or q.shape[2] < shape.len_kv:
        raise ArgumentError(
            got=f"{shape.len_kv} tokens, {shape.heads_q} query and {shape.heads_kv} key heads"
            f" of dimension {shape.dim} of {source}",
            needed=f"what it has: at most {k.shape[2]} tokens, {has[0]} query and {has[1]} key"
            f" heads of dimension {has[2]}",
            do=f"ask for these sizes, or for drawn heads: --data {DRAWN[0]}",
        )
    rows = slice(shape.len_kv - shape.len_q, shape.len_kv)
    parts = (q[:, :, rows], k[:, :, : shape.len_kv], v[:, :, : shape.len_kv])
    return tuple(np.repeat(x[:1], shape.batch, axis=0) for x in parts)


def draw(kind: str, shape: Shape, rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """Draw heads.

    ``local``: keys walk at random and queries look for keys near their own, as the heads of a
    language model mostly do; ``normal``: everything N(0, 1), the mass everywhere; ``sink``:
    every row gives most of its mass to the first key.
    """
    batch, heads_q, heads_kv = shape.batch, shape.heads_q, shape.heads_kv
    keys = (batch, heads_kv, shape.len_kv, shape.dim)
    rows = (batch, heads_q, shape.len_q, shape.dim)
    value = rng.standard_normal(keys, np.float32)
    query, key = rng.standard_normal(rows, np.float32), rng.standard_normal(keys, np.float32)
    if kind == "local":
        key = key.cumsum(axis=2, dtype=np.float32)
        key *= shape.dim**0.5 * 1.5 / np.linalg.norm(key, axis=-1, keepdims=True)
        near = np.repeat(key[:, :, shape.len_kv - shape.len_q :], heads_q // heads_kv, axis=1)
        query = near + 0.25 * query
    elif kind == "sink":
        direction = rng.standard_normal((batch, heads_kv, 1, shape.dim)).astype(np.float32)
        key[:, :, :1] = direction * 4
        query += np.repeat(direction, heads_q // heads_kv, axis=1)
    return query, key, value
