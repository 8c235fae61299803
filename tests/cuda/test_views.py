"""Arrays are described as they are, or refused with what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adaattn_core.errors import DTypeError, UnsupportedError
from adaattn_cuda.device.views import ArrayView, broadcast, view


def interface(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str) -> Any:
    facts = {"shape": shape, "strides": strides, "data": (4096, False), "typestr": "<f4"}
    return SimpleNamespace(
        __cuda_array_interface__=facts, dtype=dtype, device=SimpleNamespace(id=1)
    )


def test_cuda_array_interface() -> None:
    assert view(interface((2, 3), (12, 4), "float32")) == ArrayView(
        4096, (2, 3), (3, 1), "f32", 1
    )
    assert view(interface((2, 3, 5), None, "bfloat16")).strides == (15, 5, 1)
    assert view(interface((4, 8), (0, 2), "float16")).strides == (0, 1)


class OnCuda:
    """A host array that says it is on a CUDA device, as far as DLPack asks."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 3

    def __dlpack__(self, stream: int, **wanted: Any) -> Any:
        assert stream == -1
        return self.array.__dlpack__(**wanted)


def test_dlpack() -> None:
    array = np.zeros((4, 6), np.float16)[1:, ::2]
    seen = view(OnCuda(array))
    assert seen == ArrayView(array.ctypes.data, (3, 3), (6, 2), "f16", 3)
    assert view(OnCuda(np.zeros(4, bool))).dtype == "bool"
    bf16 = torch.zeros((2, 3), dtype=torch.bfloat16).T
    assert view(OnCuda(bf16)) == ArrayView(bf16.data_ptr(), (3, 2), (1, 3), "bf16", 3)


@pytest.mark.parametrize(
    "array", [np.zeros(3), torch.zeros(3), [1.0]], ids=["numpy", "torch", "list"]
)
def test_host_arrays_are_refused(array: Any) -> None:
    with pytest.raises(UnsupportedError, match="CUDA memory"):
        view(array)


def test_gradient_is_not_cut_silently() -> None:
    with pytest.raises(UnsupportedError, match=r"x\.detach\(\)"):
        view(torch.zeros(3, requires_grad=True))


def test_unknown_dtype() -> None:
    with pytest.raises(DTypeError, match="int64"):
        view(interface((2,), None, "int64"))


def test_broadcast_needs_no_memory() -> None:
    row = ArrayView(64, (5, 1), (1, 1), "f32", 0)
    assert broadcast(row, (2, 3, 5, 7)) == ArrayView(64, (2, 3, 5, 7), (0, 0, 1, 0), "f32", 0)
