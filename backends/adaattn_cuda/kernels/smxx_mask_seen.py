"""Host side of ``smxx_mask_seen``: which keys and rows an array mask leaves visible."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import kernel_of
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.kernels.sm80_attn_fwd import BIAS_TYPES
from adaattn_cuda.work.geometry import Geometry

__all__ = ["MaskSeen", "shipped"]

KEYS, THREADS, WARPS = 32, 256, 8
_AXES = ("batch", "head", "row", "key")


class _Params(ctypes.Structure):
    """The twin of ``Params`` in smxx_mask_seen.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("allowed", "bias")),
        *((f"{x}_{axis}", ctypes.c_int64) for x in ("allowed", "bias") for axis in _AXES),
        *((name, ctypes.c_void_p) for name in ("keys", "rows")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "bias_type", "heads_q", "heads_kv", "all_q", "all_kv", "batch_first", "q_start",
                "len_q", "kv_start", "len_kv", "start_offset", "stop_offset", "heads_alike",
                "key_blocks", "row_blocks", "key_grid",
            )
        ),
    )  # fmt: skip


def _spec(arch: str) -> KernelSpec:
    return KernelSpec("smxx_mask_seen", (KEYS,), 0, arch, folder="mask")


def shipped(arch: str) -> list[KernelSpec]:
    """Its one specialisation, for `adaattn warmup` and the budgets."""
    return [_spec(arch)]


class MaskSeen:
    """The kernel's launches for one layout of masks; only addresses are missing.

    Parameters
    ----------
    problem : AttentionProblem
    parts : sequence of SequenceSpan or None
        Stretches to look at; None is the whole batch, of sequences that fill it.
    allowed, bias : ArrayView or None
        Masks, broadcast to (batch, heads_q, len_q, len_kv).
    device, stream : int
        Where it will be started first: loading a kernel is refused during a graph capture.

    Attributes
    ----------
    keys_bytes, rows_bytes : int
        A byte for each (batch, heads_kv, len_kv) and each (batch, heads_q, len_q): 1 where the
        key is seen by a row of its group, and the row sees a key. Nothing is written outside of
        the stretches.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        parts: Sequence[SequenceSpan | None],
        allowed: ArrayView | None,
        bias: ArrayView | None,
        device: int,
        stream: int,
    ) -> None:
        self.keys_bytes = problem.batch * problem.heads_kv * problem.len_kv
        self.rows_bytes = problem.batch * problem.heads_q * problem.len_q
        kernel = kernel_of(_spec(driver.device_facts(device).arch), THREADS, stream)
        kernel.prepare(device)
        self._device = device
        self._calls: list[tuple[driver.Call, _Params]] = []
        for part in parts if problem.sequences else ():
            params, grid = packed(problem, part, allowed, bias)
            if grid:
                self._calls.append((driver.Call(kernel, params, grid), params))

    def start(self, masks: tuple[int, int], keys: int, rows: int, stream: int) -> None:
        """Enqueue it; the caller keeps other threads out until it returns.

        Parameters
        ----------
        masks : tuple of int
            Addresses of the boolean and the additive mask; 0: none.
        keys, rows : int
            Addresses of the bytes.
        stream : int
        """
        for call, params in self._calls:
            params.allowed, params.bias = masks
            params.keys, params.rows = keys, rows
            call.to(stream).start(self._device)


def packed(
    problem: AttentionProblem,
    part: SequenceSpan | None,
    allowed: ArrayView | None,
    bias: ArrayView | None,
) -> tuple[_Params, int]:
    """Return the parameters of one stretch, without addresses, and the blocks that it takes."""
    span = problem.sequences[0] if part is None else part
    mask = problem.mask
    geometry = Geometry(
        problem.sequences, problem.heads_q, problem.heads_kv, problem.dim_qk, problem.dim_v,
        mask.alignment == "bottom_right", mask.left, mask.right,
    )  # fmt: skip
    batch = problem.batch if part is None else 1
    params = _Params(
        heads_q=problem.heads_q, heads_kv=problem.heads_kv,
        all_q=problem.len_q, all_kv=problem.len_kv,
        batch_first=0 if part is None else span.batch,
        q_start=span.q_start, len_q=span.len_q, kv_start=span.kv_start, len_kv=span.len_kv,
        bias_type=0 if bias is None else BIAS_TYPES[bias.dtype],
        heads_alike=int(all(m is None or m.strides[1] == 0 for m in (allowed, bias))),
        key_blocks=-(-span.len_kv // KEYS), row_blocks=-(-span.len_q // WARPS),
    )  # fmt: skip
    params.start_offset, params.stop_offset = geometry.offsets(span)
    for name, array in (("allowed", allowed), ("bias", bias)):
        if array is not None:
            for axis, stride in zip(_AXES, array.strides, strict=True):
                setattr(params, f"{name}_{axis}", stride)
    params.key_grid = batch * problem.heads_kv * params.key_blocks
    return params, params.key_grid + batch * problem.heads_q * params.row_blocks
