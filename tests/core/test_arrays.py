"""Border crossing: arrays of other libraries come in and go out unchanged."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adaattn_core.arrays import array_device, dtype_name, like, move_axis_layout, to_numpy
from adaattn_core.errors import DTypeError, UnsupportedError

torch = pytest.importorskip("torch")

PAIRS = [
    (np.float64, torch.float64, "f64"),
    (np.float32, torch.float32, "f32"),
    (np.float16, torch.float16, "f16"),
    (ml_dtypes.bfloat16, torch.bfloat16, "bf16"),
    (np.bool_, torch.bool, "bool"),
]


@pytest.mark.parametrize(("numpy_dtype", "torch_dtype", "name"), PAIRS)
def test_dtypes_have_one_name(numpy_dtype: Any, torch_dtype: Any, name: str) -> None:
    assert dtype_name(np.zeros(2, numpy_dtype)) == name
    assert dtype_name(torch.zeros(2, dtype=torch_dtype)) == name


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.complex64, ">f4"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(DTypeError, match="cast the array first"):
        dtype_name(np.zeros(2, dtype))
    with pytest.raises(DTypeError):
        dtype_name([1.0])


@pytest.mark.parametrize(("numpy_dtype", "torch_dtype", "name"), PAIRS)
def test_there_and_back(numpy_dtype: Any, torch_dtype: Any, name: str) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) - 7).to(torch_dtype)
    array = to_numpy(tensor)
    assert array.dtype == numpy_dtype
    np.testing.assert_array_equal(
        array.astype(np.float64), tensor.to(torch.float64).numpy(), err_msg=name
    )
    back = like(array, tensor)
    assert back.dtype == torch_dtype
    assert torch.equal(back, tensor)


def test_numpy_passes_untouched() -> None:
    x = np.arange(6.0)[::2]
    assert to_numpy(x) is x
    assert like(x, x) is x


def test_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.zeros(4)
    to_numpy(tensor)
    array = to_numpy(tensor)
    tensor[0] = 5
    assert array[0] == 5


def test_strides_survive() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2)[:, ::2]
    np.testing.assert_array_equal(to_numpy(tensor), tensor.numpy())


def test_gradients_are_not_cut_silently() -> None:
    with pytest.raises(UnsupportedError, match="would cut the gradient"):
        to_numpy(torch.zeros(2, requires_grad=True))


def test_arrays_on_a_device_are_refused() -> None:
    x = torch.zeros(2, device="meta")
    assert array_device(x) == "meta"
    with pytest.raises(UnsupportedError, match="an array on meta"):
        to_numpy(x)


def test_devices() -> None:
    assert array_device(np.zeros(2)) == "cpu"
    assert array_device(torch.zeros(2)) == "cpu"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("cpu:0", "cpu"),
        ("TFRT_CPU_0", "cpu"),
        ("CPU", "cpu"),
        ("cuda:1", "cuda:1"),
        ("cpux", "cpux"),
    ],
)
def test_host_memory_is_one_place_whatever_it_is_numbered(told: str, kept: str) -> None:
    class Array:
        device = told

    assert array_device(Array()) == kept


def test_like_can_keep_the_values_dtype() -> None:
    values = np.arange(3, dtype=np.float32)
    kept = like(values, torch.zeros(3, dtype=torch.bfloat16), keep_dtype=False)
    assert kept.dtype == torch.float32


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_layout_is_its_own_inverse(make: Any) -> None:
    x = make((2, 3, 4, 5))
    turned = move_axis_layout(x, "bshd")
    assert tuple(turned.shape) == (2, 4, 3, 5)
    assert tuple(move_axis_layout(turned, "bshd").shape) == (2, 3, 4, 5)
    assert move_axis_layout(x, "bhsd") is x
