"""Where the arrays of a test live: NumPy's, or another library's on one of its devices."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adaattn_core.mask import Mask


@dataclass(frozen=True, slots=True)
class ArrayHome:
    """Where arrays are put for the backend: ``numpy``, ``torch:cuda``, ``cupy``, ..."""

    namespace: Any = None
    device: str | None = None

    @classmethod
    def parse(cls, text: str) -> ArrayHome:
        """Read ``MODULE`` or ``MODULE:DEVICE``."""
        module, _, device = text.partition(":")
        if module == "numpy":
            return cls()
        return cls(importlib.import_module(f"array_api_compat.{module}"), device or None)

    def send(self, x: NDArray[Any]) -> Any:
        """Put a NumPy array there; bf16 keeps its values."""
        if self.namespace is None:
            return x
        if x.dtype == ml_dtypes.bfloat16:
            # A copy of a broadcast array may put its last axis outermost: no layout that a
            # backend has to take.
            copied = x.astype(np.float32)
            if copied.strides[-1] != copied.itemsize:
                copied = np.ascontiguousarray(copied)
            wide = self.namespace.asarray(copied, device=self.device)
            return self.namespace.astype(wide, self.namespace.bfloat16)
        with warnings.catch_warnings():  # broadcast arrays are read-only; nobody writes them
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return self.namespace.asarray(x, device=self.device)

    def fetch(self, x: Any) -> NDArray[Any]:
        """Copy an array of any library to NumPy; bf16 comes back as float32."""
        if isinstance(x, np.ndarray):
            return x.copy()
        xp = array_api_compat.array_namespace(x)
        if str(x.dtype).endswith("bfloat16"):
            x = xp.astype(x, xp.float32)
        return np.from_dlpack(array_api_compat.to_device(x, "cpu")).copy()

    def send_mask(self, mask: Mask) -> Mask:
        """Put the arrays of a mask there."""
        arrays = {"allowed": mask.allowed, "bias": mask.bias}
        return replace(
            mask, **{n: None if x is None else self.send(x) for n, x in arrays.items()}
        )
