"""The caller's array library: where outputs are allocated and which stream is current.

Outputs come from the caller's own allocator (torch's or CuPy's pool), so that they obey its
streams, its graph captures and its memory limits.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import array_api_compat

from adaattn_core.errors import AdaAttnError, BackendUnavailableError
from adaattn_cuda.device.views import view

__all__ = ["Library", "adopt", "library_of"]


class Library(Protocol):
    """What the backend asks of an array library."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Return an uninitialised array beside `like`, as ``f32`` or in the dtype of `like`."""
        ...

    def outputs(
        self, shape: tuple[int, ...], dtype: str, like: Any
    ) -> tuple[Any, Any, tuple[int, int]]:
        """Return an output of `shape`, an f32 array of its rows, and their addresses."""
        ...

    def stream(self, device: int) -> int:
        """Return the handle of the stream that the caller works on."""
        ...

    def layout(self, array: Any) -> Hashable:
        """Return what tells arrays apart that need different launches: all but the address."""
        ...

    def pointer(self, array: Any) -> int:
        """Return the address of element 0."""
        ...

    def inputs(self, query: Any, key: Any, value: Any) -> tuple[tuple[int, int, int], Hashable]:
        """Return the addresses of the three, and what their layouts have to say together."""
        ...


class TorchLibrary:
    """Torch tensors."""

    # A C function: a decode step asks for sixteen.
    pointer: Callable[[Any], int] = staticmethod(operator.methodcaller("data_ptr"))
    """Address by `data_ptr`."""

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        self._float32 = self._torch.float32
        # What torch's own generated code calls; the public way builds an object, for 3 us.
        raw = getattr(self._torch._C, "_cuda_getCurrentRawStream", None)
        self._raw_stream: Callable[[int], int] = raw or self._public_stream

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Allocate from torch's caching allocator."""
        try:
            if dtype == "f32":
                return like.new_empty(shape, dtype=self._float32)
            return like.new_empty(shape)
        except self._torch.OutOfMemoryError as error:
            raise _out_of_memory(shape, dtype) from error

    def outputs(
        self, shape: tuple[int, ...], dtype: str, like: Any
    ) -> tuple[Any, Any, tuple[int, int]]:
        """Allocate as `empty` does."""
        try:
            out, lse = like.new_empty(shape), like.new_empty(shape[:3], dtype=self._float32)
        except self._torch.OutOfMemoryError as error:
            raise _out_of_memory(shape, dtype) from error
        return out, lse, (out.data_ptr(), lse.data_ptr())

    def stream(self, device: int) -> int:
        """Torch's current stream on the device."""
        return self._raw_stream(device)

    def layout(self, array: Any) -> Hashable:
        """Shape, strides, dtype, device, and whether it wants a gradient (which is refused)."""
        return (
            array.shape, array.stride(), array.dtype, array.device, array.requires_grad
        )  # fmt: skip

    def inputs(self, query: Any, key: Any, value: Any) -> tuple[tuple[int, int, int], Hashable]:
        """By attributes alone, the device by its number: this is on the path of every call."""
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        layout = (
            query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
            query.dtype, key.dtype, value.dtype,
            query.get_device(), key.get_device(), value.get_device(),  # -1 for the host
            query.requires_grad, key.requires_grad, value.requires_grad,
        )  # fmt: skip
        return pointers, layout

    def _public_stream(self, device: int) -> int:
        return int(self._torch.cuda.current_stream(device).cuda_stream)


class CupyLibrary:
    """CuPy arrays, and outputs for libraries without an allocator that writes into place."""

    def __init__(self, hint: str = "") -> None:
        try:
            self._cupy = importlib.import_module("cupy")
        except ImportError:
            raise BackendUnavailableError(
                got=f"arrays of {hint or 'CuPy'}, and no CuPy installed",
                needed="CuPy to allocate the output",
                do="pip install 'adaattn[cuda]', or pass torch tensors",
                reason="CuPy is not installed",
            ) from None

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Allocate from CuPy's memory pool, on the device of `like`."""
        kind = "float32" if dtype == "f32" else like.dtype
        try:
            with self._cupy.cuda.Device(view(like).device):
                return self._cupy.empty(shape, kind)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise _out_of_memory(shape, dtype) from error

    def outputs(
        self, shape: tuple[int, ...], dtype: str, like: Any
    ) -> tuple[Any, Any, tuple[int, int]]:
        """Allocate both."""
        out, lse = self.empty(shape, dtype, like), self.empty(shape[:3], "f32", like)
        return out, lse, (self.pointer(out), self.pointer(lse))

    def from_dlpack(self, array: Any) -> Any:
        """Return a CuPy array over the memory of another library's."""
        return self._cupy.from_dlpack(array)

    def stream(self, device: int) -> int:
        """CuPy's current stream on the device."""
        return int(self._cupy.cuda.get_current_stream(device).ptr)

    def layout(self, array: Any) -> Hashable:
        """Everything in its view but the address."""
        return view(array)[1:]

    def pointer(self, array: Any) -> int:
        """Address by its view."""
        return view(array).pointer

    def inputs(self, query: Any, key: Any, value: Any) -> tuple[tuple[int, int, int], Hashable]:
        """By the three views."""
        q, k, v = view(query), view(key), view(value)
        return (q.pointer, k.pointer, v.pointer), (q[1:], k[1:], v[1:])


class ForeignLibrary(CupyLibrary):
    """Any other library with DLPack (JAX, ...): CuPy allocates, DLPack hands over."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Allocate with CuPy and hand the memory over without a copy."""
        namespace = array_api_compat.array_namespace(like)
        return namespace.from_dlpack(super().empty(shape, dtype, like))


_libraries: dict[type, Library] = {}


def library_of(array: Any) -> Library:
    """Library of an array, by the package that its type comes from."""
    found = _libraries.get(type(array))
    if found is None:
        found = _libraries[type(array)] = _find(array)
    return found


def _find(array: Any) -> Library:
    name = type(array).__module__.split(".", 1)[0]
    if hasattr(array, "data_ptr") and "torch" in sys.modules:
        return TorchLibrary()
    return CupyLibrary() if name == "cupy" else ForeignLibrary(name)


def adopt(array: Any) -> Any:
    """Return a CuPy array over the memory of a bare view (cuda.core's), by DLPack."""
    return CupyLibrary("bare memory views").from_dlpack(array)


def _out_of_memory(shape: tuple[int, ...], dtype: str) -> AdaAttnError:
    return AdaAttnError(
        got=f"no device memory for an output of shape {shape} ({dtype})",
        needed="room for the output beside the inputs",
        do="free device memory, or compute fewer heads or batch entries at a time",
    )
