"""The backend ``cuda``: dense attention in f32, tf32, f16 and bf16, on any GPU from Ampere on.

A run allocates its two outputs from the caller's library, starts one kernel per pair of formats
on the caller's stream, and returns. It neither waits for the device nor copies anything to it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, cast

from numpy.typing import NDArray

from adaattn_core.backend import Capabilities, RawResult, RowErrors, RunFacts
from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import MeasureRequest, ProblemStats
from adaattn_cuda import driver, sm80, sm90_launch
from adaattn_cuda.arrays import ArrayView, broadcast, contiguous, view
from adaattn_cuda.facts import LazyFacts
from adaattn_cuda.launch import Launch, LaunchCache, Sm80Launch
from adaattn_cuda.library import library_of
from adaattn_cuda.row_facts import RowFacts
from adaattn_cuda.toolchain import nvrtc_version

__all__ = ["CudaBackend"]

_PLANS_REMEMBERED = 32
_BIAS_FORMATS = tuple(sm80.BIAS_TYPES)

Arrays = tuple[
    ArrayView, ArrayView, ArrayView, ArrayView, ArrayView, ArrayView | None, ArrayView | None
]
"""query, key, value, out, lse, boolean mask, additive mask."""

Groups = dict[tuple[str, str], tuple[HeadIndex, ...] | None]
"""(qk, pv) -> the heads that run so; None stands for all of them."""


class CudaBackend:
    """See the module's text. One instance serves every device and every thread."""

    name = "cuda"

    def __init__(self) -> None:
        driver.load_driver()
        self._launches = LaunchCache()
        self._groups: dict[int, tuple[Plan, Groups]] = {}
        self._last = threading.local()

    def capabilities(self) -> Capabilities:
        """Dense in four formats; nothing is measured or sampled."""
        device = max(driver.current_device(), 0)
        hopper = driver.device_facts(device).arch == "sm_90a"
        return Capabilities(
            qk_formats=sm80.OPERAND_FORMATS,
            pv_formats=sm80.OPERAND_FORMATS,
            structures=("dense",),
            array_devices=("cuda",),
            measures=False,
            target="sm90" if hopper else "sm80",
        )

    def measure(
        self, problem: AttentionProblem, request: MeasureRequest
    ) -> tuple[ProblemStats, Any]:
        """Not offered: see `capabilities`.

        Raises
        ------
        UnsupportedError
            Always.
        """
        _refuse_sampling("measurements of a problem on the GPU")

    def row_errors(
        self, problem: AttentionProblem, raw: RawResult, rows: Mapping[HeadIndex, NDArray[Any]]
    ) -> dict[HeadIndex, RowErrors]:
        """Not offered: see `capabilities`.

        Raises
        ------
        UnsupportedError
            Always.
        """
        _refuse_sampling("errors of sampled rows on the GPU")

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Start the plan on the caller's stream; see `adaattn_core.backend.Backend.run`.

        Raises
        ------
        UnsupportedError
            If a structure, a format, a dtype or a layout is not one of `capabilities`.
        ShapeError
            If the arrays and the mask are on different devices.
        AdaAttnError
            If device memory runs out, or the driver reports an error.
        """
        if workspace is not None:
            raise UnsupportedError(
                got="a workspace",
                needed="none: this backend measures nothing",
                do="pass the workspace to the backend that made it",
            )
        if problem.dtype not in sm80.INPUT_FORMATS:
            raise UnsupportedError(
                got=f"{problem.dtype} arrays",
                needed=f"one of {', '.join(sm80.INPUT_FORMATS)} on the GPU",
                do='cast them, or use backend="numpy" for float64',
                dtype=problem.dtype,
            )
        query, key, value = view(problem.query), view(problem.key), view(problem.value)
        library = library_of(problem.query)
        if into is None:
            rows = query.shape[:3]
            out = library.empty((*rows, value.shape[3]), problem.dtype, problem.query)
            lse = library.empty(rows, "f32", problem.query)
            groups = self._groups_of(plan) if heads is None else _group(plan, heads)
        else:
            out, lse = into.out, into.lse
            groups = _group(plan, plan.heads if heads is None else heads)
        if into is None:  # the library's own, C-contiguous
            device = query.device
            out_view = contiguous(
                library.pointer(out), (*rows, value.shape[3]), query.dtype, device
            )
            lse_view = contiguous(library.pointer(lse), rows, "f32", device)
        else:
            out_view, lse_view = view(out), view(lse)
        arrays = (query, key, value, out_view, lse_view, *_mask_views(problem, query.device))
        stream = library.stream(query.device)
        launches = [
            self._start(problem, arrays, formats, chosen, stream)
            for formats, chosen in groups.items()
        ]
        self._last.launches, self._last.device = launches, query.device
        records = RowFacts(problem, (*arrays[:3], out_view), library, stream)
        chosen = plan.heads if heads is None else {index: plan[index] for index in heads}
        if into is None:
            facts = LazyFacts(problem, records, chosen)
            return RawResult(out, lse, cast("dict[HeadIndex, RunFacts]", facts))
        cast(LazyFacts, into.facts).replan(records, chosen)
        return into

    def provenance(self) -> dict[str, str]:
        """Device, compiler, and the kernels of this thread's last run."""
        device = getattr(self._last, "device", max(driver.current_device(), 0))
        facts = driver.device_facts(device)
        return {
            "device": facts.name,
            "arch": facts.arch,
            "nvrtc": nvrtc_version(),
            "kernels": "; ".join(launch.name for launch in self.last_launches()),
        }

    def last_launches(self) -> tuple[Launch, ...]:
        """Return what this thread's last run started, ready for other addresses."""
        return tuple(getattr(self._last, "launches", ()))

    # -- pieces of run ------------------------------------------------------------------------
    def _start(
        self,
        problem: AttentionProblem,
        arrays: Arrays,
        formats: tuple[str, str],
        heads: tuple[HeadIndex, ...] | None,
        stream: int,
    ) -> Launch:
        query, key, value, out, lse, allowed, bias = arrays
        mask = problem.mask
        pointers = (
            query.pointer,
            key.pointer,
            value.pointer,
            out.pointer,
            lse.pointer,
            allowed.pointer if allowed else 0,
            bias.pointer if bias else 0,
        )
        # Everything but the addresses; of those, only whether rows begin on 16 bytes.
        known_by = (
            (query[1:], key[1:], value[1:], out[1:], lse[1:]),
            (query.pointer | key.pointer | value.pointer | out.pointer) & 15,
            allowed[1:] if allowed else None,
            bias[1:] if bias else None,
            (mask.left, mask.right, mask.alignment),
            (mask.lengths, mask.cu_seqlens_q, mask.cu_seqlens_kv),
            (problem.scale, formats, heads),
        )
        launch = self._launches.get(known_by)
        if launch is None:
            launch = self._make(problem, arrays, formats, heads, stream)  # may compile
            self._launches.put(known_by, launch)
        launch.start(pointers, query.device, stream)
        return launch

    @staticmethod
    def _make(
        problem: AttentionProblem,
        arrays: Arrays,
        formats: tuple[str, str],
        heads: tuple[HeadIndex, ...] | None,
        stream: int,
    ) -> Launch:
        """Choose the kernel: Hopper's own where it takes the task, else the sm80 family."""
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
        return Sm80Launch(task, query.device)

    def _groups_of(self, plan: Plan) -> Groups:
        """Return the groups of a plan, remembered for as long as the plan is used again."""
        known = self._groups.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        groups = _group(plan, plan.heads)
        if len(groups) == 1:
            groups = dict.fromkeys(groups)
        while len(self._groups) >= _PLANS_REMEMBERED:
            self._groups.pop(next(iter(self._groups)), None)
        self._groups[id(plan)] = (plan, groups)
        return groups


def _group(plan: Plan, heads: Collection[HeadIndex]) -> Groups:
    """Heads by formats; raises for a head that is not dense."""
    groups: dict[tuple[str, str], list[HeadIndex]] = {}
    for index in heads:
        head: HeadPlan = plan[index]
        if head.structure.kind != "dense":
            raise UnsupportedError(
                got=f"structure {head.structure.kind} for sequence {index[0]}, head {index[1]}",
                needed="dense: the only structure of this backend",
                do='plan with FixedPolicy(Dense(), ...), or use backend="numpy"',
                structure=head.structure.kind,
            )
        groups.setdefault((head.qk, head.pv), []).append(index)
    return {formats: tuple(found) for formats, found in groups.items()}


def _check_strides(arrays: tuple[ArrayView, ...]) -> None:
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        if min(array.shape) > 0 and array.shape[3] > 1 and array.strides[3] != 1:
            raise UnsupportedError(
                got=f"{name} with stride {array.strides[3]} along its last axis",
                needed="stride 1 there; the other strides are free",
                do="copy it once to contiguous memory (torch: x.contiguous())",
                strides=array.strides,
            )


def _mask_views(
    problem: AttentionProblem, device: int
) -> tuple[ArrayView | None, ArrayView | None]:
    """Boolean and additive mask, broadcast by strides alone."""
    mask = problem.mask
    if mask.is_structural:
        return None, None
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_kv)
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
        found.append(broadcast(seen, shape))
    return found[0], found[1]


def _refuse_sampling(what: str) -> NoReturn:
    raise UnsupportedError(
        got=what,
        needed="a plan that needs none: FixedPolicy, a saved plan, or no budget at all",
        do='use backend="numpy" for sampled policies, then run its plan here',
    )
