"""Cut the data of `adaattn demo` out of captured layers.

    python benchmarks/capture_qkv.py perl-prose.txt --tokens 8192 --layers 9,16 --out qkv/
    python benchmarks/make_demo_data.py qkv/

Keeps the first 8,192 tokens of one key/value head and the three query heads that read it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from adaattn_core.files import atomic_write

LAYERS = (9, 16)
TOKENS = 8192
HEADS_Q_PER_KV = 3
TARGET = Path(__file__).parents[1] / "adaattn_core" / "demo_data"


def main() -> None:
    """Write one compressed .npz per layer into the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captured", type=Path, help="folder that capture_qkv.py wrote")
    folder = parser.parse_args().captured
    for layer in LAYERS:
        (source,) = folder.glob(f"smollm2_layer{layer:02d}_len*.npz")
        with np.load(source) as captured:
            arrays = {
                "q": captured["q"][:HEADS_Q_PER_KV, :TOKENS],
                "k": captured["k"][:1, :TOKENS],
                "v": captured["v"][:1, :TOKENS],
                "scale": captured["scale"],
                "dtype": captured["dtype"],
            }
        path = TARGET / f"smollm2_layer{layer:02d}.npz"
        atomic_write(path, partial(np.savez_compressed, **arrays))
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
