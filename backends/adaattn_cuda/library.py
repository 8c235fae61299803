"""The caller's array library: where outputs are allocated and which stream is current.

Outputs come from the caller's own allocator (torch's or CuPy's pool), so that they obey its
streams, its graph captures and its memory limits.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import array_api_compat

from adaattn_core.errors import AdaAttnError, BackendUnavailableError
from adaattn_cuda.arrays import view

__all__ = ["Library", "library_of"]


class Library(Protocol):
    """What the backend asks of an array library."""

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Return an uninitialised array beside `like`, as ``f32`` or in the dtype of `like`."""
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


class TorchLibrary:
    """Torch tensors."""

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        # What torch's own generated code calls; the public way builds an object, for 3 us.
        raw = getattr(self._torch._C, "_cuda_getCurrentRawStream", None)
        self._raw_stream: Callable[[int], int] = raw or self._public_stream

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Allocate from torch's caching allocator."""
        try:
            if dtype == "f32":
                return like.new_empty(shape, dtype=self._torch.float32)
            return like.new_empty(shape)
        except self._torch.OutOfMemoryError as error:
            raise _out_of_memory(shape, dtype) from error

    def stream(self, device: int) -> int:
        """Torch's current stream on the device."""
        return self._raw_stream(device)

    def layout(self, array: Any) -> Hashable:
        """Shape, strides, dtype, device, and whether it wants a gradient (which is refused)."""
        return (
            array.shape, array.stride(), array.dtype, array.device, array.requires_grad
        )  # fmt: skip

    def pointer(self, array: Any) -> int:
        """Address by `data_ptr`."""
        return int(array.data_ptr())

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
        """Allocate from CuPy's memory pool."""
        kind = "float32" if dtype == "f32" else like.dtype
        try:
            return self._cupy.empty(shape, kind)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise _out_of_memory(shape, dtype) from error

    def stream(self, device: int) -> int:
        """CuPy's current stream."""
        return int(self._cupy.cuda.get_current_stream().ptr)

    def layout(self, array: Any) -> Hashable:
        """Everything in its view but the address."""
        return view(array)[1:]

    def pointer(self, array: Any) -> int:
        """Address by its view."""
        return view(array).pointer


class ForeignLibrary(CupyLibrary):
    """Any other library with DLPack (JAX, ...): CuPy allocates, DLPack hands over."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Allocate with CuPy and hand the memory over without a copy."""
        namespace = array_api_compat.array_namespace(like)
        return namespace.from_dlpack(super().empty(shape, dtype, like))


_libraries: dict[str, Library] = {}


def library_of(array: Any) -> Library:
    """Library of an array, by the package that its type comes from."""
    name = type(array).__module__.split(".", 1)[0]
    found = _libraries.get(name)
    if found is None:
        if hasattr(array, "data_ptr") and "torch" in sys.modules:
            found = TorchLibrary()
        elif name == "cupy":
            found = CupyLibrary()
        else:
            found = ForeignLibrary(name)
        _libraries[name] = found
    return found


def _out_of_memory(shape: tuple[int, ...], dtype: str) -> AdaAttnError:
    return AdaAttnError(
        got=f"no device memory for an output of shape {shape} ({dtype})",
        needed="room for the output beside the inputs",
        do="free device memory, or compute fewer heads or batch entries at a time",
    )
