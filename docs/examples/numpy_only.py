"""NumPy alone: exact attention, attention within a budget, and what the certificate says.

    python docs/examples/numpy_only.py

Needs nothing besides AdaAttn. The heads are real: they come with the package for its demo.
"""

from importlib.resources import as_file, files

import ml_dtypes
import numpy as np

from adaattn_core import ErrorBudget, Mask, attention

# Three query heads that share one key/value head, 8,192 tokens of prose; bfloat16 kept as bits.
with as_file(files("adaattn_core").joinpath("demo_data", "smollm2_layer16.npz")) as path:
    stored = np.load(path)
query, key, value = (
    stored[name].view(ml_dtypes.bfloat16).astype(np.float32)[None] for name in "qkv"
)

exact = attention(
    query, key, value, mask=Mask.causal(), scale=float(stored["scale"]), backend="numpy"
)
close = attention(
    query,
    key,
    value,
    mask=Mask.causal(),
    scale=float(stored["scale"]),
    backend="numpy",
    budget=ErrorBudget(rel=0.1),  # 95% of a head's rows within 10% of its rms row
)

for head in range(query.shape[1]):
    certificate = close.certificate[0, head]
    error = np.linalg.norm(close.out[0, head] - exact.out[0, head], axis=-1)
    rms = np.sqrt(np.mean(np.sum(close.out[0, head] ** 2, axis=-1)))
    true = np.quantile(error / rms, certificate.rows)
    print(
        f"head {head}: {close.plan[0, head].structure.kind}, "
        f"{close.facts[0, head].share:.0%} of the scores, "
        f"certified {certificate.upper:.4f} ({certificate.guarantee}), true {true:.4f}"
    )
    assert certificate.upper <= 0.1
