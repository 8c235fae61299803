"""Calls that are planned on the device: which are taken, and reading back what was decided.

`AdaptiveCalls.adapt` starts one `FarLaunch` and returns at once; everything that the host wants
to know about the call is read when somebody looks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from adaattn_core.budget import ErrorBudget
from adaattn_core.deciding import Adapted
from adaattn_core.facts import RawResult, RunFacts
from adaattn_core.lazy import Later, LazyHeads
from adaattn_core.plan import Plan
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.scores import rules_of
from adaattn_core.structure import Landmark
from adaattn_cuda.device import driver
from adaattn_cuda.device.events import start_timed
from adaattn_cuda.device.library import library_of
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.dispatch import input_views, make_task
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.kernels.task import Recipe, Task
from adaattn_cuda.planner.drawing import certifying_rows
from adaattn_cuda.planner.frozen import Frozen, frozen
from adaattn_cuda.planner.launch import FarArrays, FarLaunch
from adaattn_cuda.planner.levels import table_refusal
from adaattn_cuda.reading import Reading, Whole
from adaattn_cuda.recent import Recent
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import MAX_DIM
from adaattn_cuda.work.far_geometry import FarGeometry

__all__ = ["NARROW", "SIZES", "AdaptiveCalls"]

SIZES = tuple(
    Landmark(band=256, group=group, samples=32, tile=128, screen_rank=0, tail=128)
    for group in (1024, 2048)
)
"""Sizes in which the planning kernels run landmarks."""
NARROW = (("i8", "e4m3"), ("i8", "bf16"), ("i8", "f16"))
"""Formats in which they run dense heads first; those of 16 bits are the arrays' own."""
LEAST_REL = 0.02
"""Smallest budget that 16-bit operands keep on any head but odd ones: their own error is 0.3 to
0.5% of the rms row. Smaller budgets climb formats, step by step on the host."""
LEAST_KEYS = 2048
"""Queries and keys from which candidates are judged on the device; a table without any is dense
whatever the length, and served there too: the host takes milliseconds for its certificate."""
_CALLS_REMEMBERED = 256


class AdaptiveCalls:
    """Launches of the planning kernels, remembered by layout, table, budget and seed."""

    def __init__(self) -> None:
        self._launches: Recent[tuple[FarLaunch, int]] = Recent(_CALLS_REMEMBERED)

    def adapt(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        *,
        seed: int | None,
        profile: bool,
    ) -> Adapted | str:
        """See `adaattn_core.deciding.Decides.adapt`.

        Raises
        ------
        UnsupportedError
            If the first call of its kind records a CUDA graph: tables must be copied first.
        AdaAttnError
            If device memory runs out, or the driver reports an error.
        """
        return self._call(problem, table, budget, None, seed, profile)

    def repeat(
        self, problem: AttentionProblem, plan: Plan, budget: ErrorBudget, *, profile: bool
    ) -> Adapted | str:
        """See `adaattn_core.deciding.Repeats.repeat`; raises as `adapt` does."""
        if budget.guarantee != "sampled":
            return f"guarantee {budget.guarantee}: only sampled ones are kept on the device"
        found = frozen(plan, problem, SIZES)
        if isinstance(found, str):
            return found
        return self._call(problem, found.table, budget, found, plan.seed, profile)

    def _call(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        given: Frozen | None,
        seed: int | None,
        profile: bool,
    ) -> Adapted | str:
        wide = max(problem.dim_qk, problem.dim_v) > MAX_DIM
        if wide or min(problem.len_q, problem.len_kv) < LEAST_KEYS:
            table = replace(table, narrow=None) if table.narrow else table
        query, key, value = input_views(problem)
        inputs = (query, key, value)
        decided = given.decided if given else None
        found = self._launch(problem, table, budget, inputs, seed, decided)
        if isinstance(found, str):
            return found
        launch, used_seed = found
        library = library_of(problem.query)
        stream, shape = library.stream(query.device), (*query.shape[:3], value.shape[3])
        out, lse, written = library.outputs(shape, problem.dtype, problem.query)
        kept = library.empty((-(-launch.kept.size // 4),), "f32", problem.query)
        scratch = library.empty((-(-launch.scratch.size // 4),), "f32", problem.query)
        out_view = contiguous(written[0], shape, query.dtype, query.device)
        lse_view = contiguous(written[1], shape[:3], "f32", query.device)
        arrays = FarArrays(
            sm90.DeviceMatrix.of(query),
            sm90.DeviceMatrix.of(key),
            sm90.DeviceMatrix.of(value),
            sm90.DeviceMatrix.of(out_view),
            sm90.DeviceMatrix.of(lse_view),
        )
        addresses = library.pointer(kept), library.pointer(scratch)
        notes: dict[str, Any] = {"planned_on": "device"}
        if profile:
            steps = launch.steps(arrays, *addresses)
            notes["stage_ms"] = Later(start_timed(steps, query.device, stream))
        else:
            launch.start(arrays, *addresses, stream)
        # The kept figures stay with the result; the scratch memory goes back to the library,
        # whose allocator hands it out again in the order of the stream.
        reading = Later(lambda: Reading(launch, library.pointer(kept), query.device, kept))
        whole = Whole(problem, table, budget, reading, given.plan if given else None)
        notes["escalated"] = Later(whole.escalated)
        sizes = launch.scratch.size, launch.kept.size, launch.workspace_bytes
        notes["workspace_bytes"] = sum(sizes)
        facts = cast("dict[HeadIndex, RunFacts]", LazyHeads(whole.facts))
        return Adapted(
            raw=RawResult(out, lse, facts),
            seed=used_seed,
            plans=LazyHeads(whole.plans),
            certificates=LazyHeads(whole.certificates),
            stats=LazyHeads(whole.stats),
            notes=notes,
        )

    def _launch(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        arrays: tuple[ArrayView, ...],
        seed: int | None,
        decided: tuple[int, ...] | None,
    ) -> tuple[FarLaunch, int] | str:
        """Return the launch of such a call and its seed, or why there is none.

        What a refusal depends on is part of what a launch is known by: it is asked for once.
        """
        device, mask = arrays[0].device, problem.mask
        known_by: Hashable = (
            tuple((array.pointer % 16, *array[1:]) for array in arrays),
            (mask.left, mask.right, mask.alignment, mask.is_structural),
            (mask.lengths is None, mask.cu_seqlens_q is None),
            (problem.scale, problem.softcap, problem.sinks is None),
            table,
            (budget.rel, budget.rows, budget.confidence),
            seed,
            decided,
        )
        found = self._launches.get(known_by)
        if found is None:
            # The output's address is unknown: an allocator's alignment is taken for granted.
            layout = sm90.arrays_refusal(*arrays)
            reason = refusal(problem, table, budget, device) or layout
            if reason:
                return reason
            used = seed if seed is not None else int(np.random.default_rng().integers(2**48))
            stream = library_of(problem.query).stream(device)
            launch = FarLaunch(
                geometry(problem, table, budget),
                problem.dtype,
                problem.scale,
                table,
                budget,
                used,
                device,
                stream,
                decided,
                _narrow_task(problem, table, arrays),
            )
            found = launch, used
            self._launches.put(known_by, found)
        return found


def refusal(
    problem: AttentionProblem, table: DecisionTable, budget: ErrorBudget, device: int
) -> str:
    """Why a problem is not planned on the device; empty if it is."""
    mask = problem.mask
    span = problem.sequences[0] if problem.sequences else None
    if driver.device_facts(device).arch != "sm_90a":
        return "the planning kernels are Hopper's"
    if rules_of(problem):
        return f"{' and '.join(rules_of(problem))}: the planning kernels know neither"
    if problem.dtype not in ("bf16", "f16"):
        return f"dtype {problem.dtype}: planned on the device in 16-bit formats only"
    if budget.rel < LEAST_REL:
        return f"rel={budget.rel}: below {LEAST_REL} formats wider than 16 bits may be needed"
    if not mask.is_structural or mask.left is not None or mask.right not in (None, 0):
        return f"{mask.describe()} mask: causal or none are planned on the device"
    if mask.lengths is not None or mask.cu_seqlens_q is not None:
        return "sequences of their own lengths are not planned on the device"
    if span is None or not span.len_q or not span.len_kv:
        return "no queries or no keys"
    if table.candidates and min(span.len_q, span.len_kv) < LEAST_KEYS:
        return f"shorter than {LEAST_KEYS} queries and keys"
    if mask.right == 0 and _offset(problem) < 0:
        return "more queries than keys under a causal mask"
    if mask.right == 0 and span.len_kv > span.len_q + _offset(problem):
        return "keys that no row sees: the planning kernels' norms would hold them"
    unlike = table_refusal(table, problem.dtype, SIZES)
    if unlike:
        return unlike
    if certifying_rows(span.len_q, budget, retried=_retried(table)) is None:
        return f"rows={budget.rows}, confidence={budget.confidence}: more rows than are drawn"
    return ""


def geometry(
    problem: AttentionProblem, table: DecisionTable, budget: ErrorBudget
) -> FarGeometry:
    """Sizes of a call; those of the structure are the candidates'."""
    structure = table.candidates[0].plan.structure if table.candidates else SIZES[0]
    assert isinstance(structure, Landmark)
    return FarGeometry(
        batch=len(problem.sequences), heads_q=problem.heads_q, heads_kv=problem.heads_kv,
        len_q=problem.len_q, len_kv=problem.len_kv, dim_qk=problem.dim_qk,
        dim_v=problem.dim_v, causal=problem.mask.right == 0, offset=_offset(problem),
        group=structure.group, band=structure.band, samples=structure.samples,
        drawn=certifying_rows(problem.len_q, budget, retried=_retried(table)) or 0,
    )  # fmt: skip


def _retried(table: DecisionTable) -> bool:
    """Whether heads that miss the budget have something safer to run again as."""
    return bool(table.candidates) or table.narrow is not None


def _narrow_task(
    problem: AttentionProblem, table: DecisionTable, arrays: tuple[ArrayView, ...]
) -> Task | None:
    """Return the problem as the 8-bit kernel takes it, if the table has heads run so first."""
    if table.narrow is None:
        return None
    query, key, value = arrays
    shape = (*query.shape[:3], value.shape[3])
    out = contiguous(0, shape, query.dtype, query.device)
    lse = contiguous(0, shape[:3], "f32", query.device)
    head = table.narrow
    recipe = Recipe(head.qk, head.pv, head.smooth_k, head.p_scale)
    return make_task(problem, (query, key, value, out, lse, None, None), recipe, None)


def _offset(problem: AttentionProblem) -> int:
    """Return how far a causal row sees beyond its own number."""
    mask = problem.mask
    bottom = mask.right == 0 and mask.alignment == "bottom_right"
    return problem.len_kv - problem.len_q if bottom else 0
