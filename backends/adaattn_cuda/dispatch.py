"""A dense problem on the device: views of its arrays, and the kernel that takes them."""

from __future__ import annotations

from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import Launch
from adaattn_cuda.device.views import ArrayView, broadcast, view
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels import sm90_launch

__all__ = ["Arrays", "addresses", "input_views", "make_launch", "mask_views"]

_BIAS_FORMATS = tuple(sm80.BIAS_TYPES)

Arrays = tuple[
    ArrayView, ArrayView, ArrayView, ArrayView, ArrayView, ArrayView | None, ArrayView | None
]
"""query, key, value, out, lse, boolean mask, additive mask."""


def input_views(problem: AttentionProblem) -> tuple[ArrayView, ArrayView, ArrayView]:
    """Return views of query, key and value.

    Raises
    ------
    UnsupportedError
        If their dtype is none of f32, f16 and bf16, they are not plain CUDA arrays, or their
        elements do not begin on multiples of their size.
    """
    if problem.dtype not in sm80.INPUT_FORMATS:
        raise UnsupportedError(
            got=f"{problem.dtype} arrays",
            needed=f"one of {', '.join(sm80.INPUT_FORMATS)} on the GPU",
            do='cast them, or use backend="numpy" for float64',
            dtype=problem.dtype,
        )
    found = view(problem.query), view(problem.key), view(problem.value)
    for name, array in zip(("query", "key", "value"), found, strict=True):
        _check_address(name, array)
    return found


def mask_views(
    mask: Mask, shape: tuple[int, ...], device: int
) -> tuple[ArrayView | None, ArrayView | None]:
    """Return boolean and additive mask, broadcast by strides alone to `shape`.

    Raises
    ------
    ShapeError
        If a mask is on another device.
    UnsupportedError
        If an additive mask is none of f32, f16 and bf16, or an array is misaligned.
    """
    if mask.is_structural:
        return None, None
    found: list[ArrayView | None] = []
    for name, array in (("boolean", mask.allowed), ("additive", mask.bias)):
        if array is None:
            found.append(None)
            continue
        seen = view(array)
        if seen.device != device:
            raise ShapeError(
                got=f"a {name} mask on device {seen.device}, arrays on device {device}",
                needed="mask and arrays on one device",
                do="move the mask first: nothing is copied between devices silently",
            )
        if name == "additive" and seen.dtype not in _BIAS_FORMATS:
            raise UnsupportedError(
                got=f"an additive mask of {seen.dtype}",
                needed=f"one of {', '.join(_BIAS_FORMATS)}",
                do="cast the mask to float32",
                dtype=seen.dtype,
            )
        _check_address(f"the {name} mask", seen)
        found.append(broadcast(seen, shape))
    return found[0], found[1]


def addresses(arrays: Arrays) -> tuple[int, ...]:
    """Return what `Launch.start` takes: where each array is, 0 for none."""
    return tuple(array.pointer if array else 0 for array in arrays)


def make_launch(
    problem: AttentionProblem,
    arrays: Arrays,
    formats: tuple[str, str],
    heads: tuple[HeadIndex, ...] | None,
    stream: int,
) -> Launch:
    """Choose the kernel, Hopper's own where it takes the task, else the sm80 family; load it.

    Parameters
    ----------
    problem : AttentionProblem
    arrays : Arrays
    formats : (qk, pv)
    heads : tuple of (sequence, head) or None
        Which to compute; None is all.
    stream : int
        Where it will be started first; asked whether it records a CUDA graph.

    Raises
    ------
    UnsupportedError
        If the last axis of an input is not contiguous, or no kernel takes the task.
    KernelCompileError
        If the kernel does not compile.
    """
    query, key, value, out, lse, allowed, bias = arrays
    _check_strides((query, key, value))
    facts = driver.device_facts(query.device)
    own_formats = heads is None and set(formats) == {problem.dtype}
    hopper = facts.arch == "sm_90a" and own_formats
    if hopper and sm90_launch.refusal(problem, arrays[:4]) is None:
        return sm90_launch.Sm90Launch(problem, arrays[:5], stream)
    mask = problem.mask
    task = sm80.DenseTask(
        query, key, value, out, lse, allowed, bias, problem.sequences,
        mask.left, mask.right, mask.alignment == "bottom_right", problem.scale,
        *formats, heads,
    )  # fmt: skip
    return sm80.Sm80Launch(task, query.device, stream)


def _check_address(name: str, array: ArrayView) -> None:
    if array.pointer % array.item_bytes:
        raise UnsupportedError(
            got=f"{name} at address {array.pointer:#x}",
            needed=f"a multiple of {array.item_bytes}, the size of its {array.dtype} elements",
            do="copy it to memory of its own",
        )


def _check_strides(arrays: tuple[ArrayView, ...]) -> None:
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        if min(array.shape) > 0 and array.shape[3] > 1 and array.strides[3] != 1:
            raise UnsupportedError(
                got=f"{name} with stride {array.strides[3]} along its last axis",
                needed="stride 1 there; the other strides are free",
                do="copy it once to contiguous memory (torch: x.contiguous())",
                strides=array.strides,
            )
