"""From a checked problem to a launch: views of its arrays, and the one choice of a kernel."""

from __future__ import annotations

from collections.abc import Hashable

from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import block_lengths
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import BackwardLaunch, Launch
from adaattn_cuda.device.views import ArrayView, broadcast, view
from adaattn_cuda.kernels import listed
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels import sm90_attn_bwd_f16 as sm90_backward
from adaattn_cuda.kernels import sm90_attn_fwd_8bit as eight_bit
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.backward_task import BackwardTask
from adaattn_cuda.kernels.sm80_attn_bwd import Sm80Backward
from adaattn_cuda.kernels.task import Arrays, BlockHeads, Recipe, Task

__all__ = [
    "input_views",
    "make_backward",
    "make_launch",
    "make_task",
    "mask_key",
    "mask_views",
    "sink_view",
]

_BIAS_FORMATS = tuple(sm80.BIAS_TYPES)

HOPPER_BACKWARD = True
"""False leaves every backward pass to the sm80 family, for tests and measurements."""

_SCALE_LEAST, _SCALE_MOST = 2.0**-120, 2.0**120
"""Scales whose products with log2(e) and with the softmax's slack are float32 numbers."""


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
                do="take each row's largest visible entry off, then cast to float32: softmax is"
                " the same, and no finite entry becomes -inf, which would hide its key",
                dtype=seen.dtype,
            )
        _check_address(f"the {name} mask", seen)
        found.append(broadcast(seen, shape))
    return found[0], found[1]


def mask_key(mask: Mask) -> Hashable:
    """Return everything about a mask that a launch depends on, but for its arrays."""
    return (
        mask.left, mask.right, mask.alignment,
        mask.lengths, mask.cu_seqlens_q, mask.cu_seqlens_kv,
    )  # fmt: skip


def make_launch(
    problem: AttentionProblem,
    arrays: Arrays,
    recipe: Recipe | tuple[str, str],
    heads: tuple[HeadIndex, ...] | None,
    stream: int,
    sinks: ArrayView | None = None,
) -> Launch:
    """Choose the kernel and make it ready: Hopper's own where it takes the task, else sm80's.

    Parameters
    ----------
    problem : AttentionProblem
    arrays : Arrays
    recipe : Recipe
        Or (qk, pv) alone.
    heads : tuple of (sequence, head) or None
        Which to compute; None is all.
    stream : int
        Where it will be started first; asked whether it records a CUDA graph.
    sinks : ArrayView, optional
        From `sink_view`.

    Raises
    ------
    UnsupportedError
        If the last axis of an input is not contiguous, or no kernel takes the task; in 8 bits
        that is every mask given as an array, and every GPU but Hopper's.
    KernelCompileError
        If the kernel does not compile.
    """
    task = make_task(problem, arrays, recipe, heads, sinks)
    if isinstance(recipe, Recipe) and recipe.blocks is not None:
        _check_blocks(problem, recipe.blocks)
        return listed.launch(task, recipe.blocks, stream)
    arch = driver.device_facts(task.query.device).arch
    if eight_bit.is_asked(task) and 0 in (*task.query.shape[:3], task.key.shape[2]):
        # Without a query or a key there is no product, in whatever format.
        plain = Recipe(problem.dtype, problem.dtype)
        return sm80.Sm80Launch(Task.of(problem, arrays, plain, heads, sinks), stream)
    if eight_bit.is_asked(task):
        reason = eight_bit.refusal(task, arch)
        if reason is not None:
            raise UnsupportedError(
                got=reason,
                needed="qk i8 or the arrays' format, pv e4m3 or the arrays' format; bf16 or f16"
                " arrays with head dims up to 128; interval masks; Hopper",
                do=f"plan qk and pv in {task.query.dtype}: FixedPolicy(qk=..., pv=...)",
                qk=task.qk,
                pv=task.pv,
            )
        return eight_bit.launch(task, stream)
    if sm90.refusal(task, arch) is None:
        return sm90.launch(task, stream)
    return sm80.Sm80Launch(task, stream)


def make_task(
    problem: AttentionProblem,
    arrays: Arrays,
    recipe: Recipe | tuple[str, str],
    heads: tuple[HeadIndex, ...] | None,
    sinks: ArrayView | None = None,
) -> Task:
    """Describe what kernels are to do.

    Raises
    ------
    UnsupportedError
        If the last axis of an input is not contiguous, or scale or softcap is out of range.
    """
    _check_strides(arrays[:3])
    _check_scale(problem.scale)
    task = Task.of(problem, arrays, recipe, heads, sinks)
    if task.softcap:
        _check_softcap(task)
    return task


def _check_blocks(problem: AttentionProblem, blocks: BlockHeads) -> None:
    """Raise PlanError where given blocks speak of other rows or keys than there are."""
    seen = set()
    for (sequence, _), structure in blocks.of.items():
        if (id(structure), sequence) not in seen:
            seen.add((id(structure), sequence))
            structure.check_fits(*block_lengths(problem, problem.sequences[sequence]))


def make_backward(task: BackwardTask, problem: AttentionProblem, stream: int) -> BackwardLaunch:
    """Choose the kernels of a backward pass and make them ready.

    Raises
    ------
    UnsupportedError
        If the last axis of an input is not contiguous, or no kernel takes the task.
    KernelCompileError
        If a kernel does not compile.
    """
    _check_strides((task.query, task.key, task.value))
    _check_scale(problem.scale)
    if task.softcap:
        _check_softcap(task)
    arch = driver.device_facts(task.query.device).arch
    if HOPPER_BACKWARD and sm90_backward.refusal(task, arch) is None:
        return sm90_backward.Sm90Backward(task, stream)
    return Sm80Backward(task, stream)


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


def sink_view(problem: AttentionProblem) -> ArrayView | None:
    """Return the problem's sinks as kernels read them.

    Raises
    ------
    UnsupportedError
        If they are not contiguous float32.
    """
    if problem.sinks is None:
        return None
    seen = view(problem.sinks)
    _check_address("sinks", seen)
    if seen.dtype != "f32" or (seen.shape[0] > 1 and seen.strides[0] != 1):
        raise UnsupportedError(
            got=f"sinks of {seen.dtype} with stride {seen.strides[0]}",
            needed="contiguous float32 on the GPU",
            do="cast them once (torch: sinks.float().contiguous()); nothing is lost",
        )
    return seen


def _check_softcap(task: Task | BackwardTask) -> None:
    """Refuse a cap which, or whose quotient with the scale, float32 does not hold."""
    for name, number in (("softcap", task.softcap), ("scale / softcap", task.softcap_rate)):
        if not _SCALE_LEAST <= number <= _SCALE_MOST:
            raise UnsupportedError(
                got=f"{name} {number:g}",
                needed=f"between {_SCALE_LEAST:g} and {_SCALE_MOST:g} on the GPU",
                do="leave softcap out where it caps nothing",
            )


def _check_scale(scale: float) -> None:
    """Kernels work in base 2 and in float32."""
    if not _SCALE_LEAST <= scale <= _SCALE_MOST:
        raise UnsupportedError(
            got=f"scale {scale:g}",
            needed=f"between {_SCALE_LEAST:g} and {_SCALE_MOST:g} on the GPU",
            do="multiply the queries by a power of two, and divide the scale by it",
            scale=scale,
        )
