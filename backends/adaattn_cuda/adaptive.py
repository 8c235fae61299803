"""Calls that are planned on the device: which are taken, and reading back what was decided.

`AdaptiveCalls.adapt` starts one `FarLaunch` and returns at once; everything that the host wants
to know about the call is read when somebody looks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.deciding import Adapted
from adaattn_core.facts import RawResult, RunFacts
from adaattn_core.lazy import Later, LazyHeads
from adaattn_core.plan import HeadPlan
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats, StructureEstimate
from adaattn_core.structure import Landmark
from adaattn_cuda.device import driver
from adaattn_cuda.device.events import start_timed
from adaattn_cuda.device.library import library_of
from adaattn_cuda.device.views import ArrayView, contiguous
from adaattn_cuda.dispatch import input_views
from adaattn_cuda.kernels import sm90_attn_fwd_f16 as sm90
from adaattn_cuda.planner.drawing import certifying_rows
from adaattn_cuda.planner.launch import FarArrays, FarLaunch
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION
from adaattn_cuda.recent import Recent
from adaattn_cuda.work.far import FarGeometry

__all__ = ["SIZES", "AdaptiveCalls"]

SIZES = tuple(
    Landmark(band=256, group=group, samples=32, tile=128, screen_rank=0, tail=128)
    for group in (1024, 2048)
)
"""Sizes in which the planning kernels run landmarks."""
LEAST_REL = 0.02
"""Smallest budget that 16-bit operands keep on any head but odd ones: their own error is 0.3 to
0.5% of the rms row. Smaller budgets climb formats, step by step on the host."""
LEAST_KEYS = 2048
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
        query, key, value = input_views(problem)
        reason = refusal(problem, table, budget, query.device)
        if reason:
            return reason
        library = library_of(problem.query)
        shape = (*query.shape[:3], value.shape[3])
        # The output's address is not known yet: an allocator's alignment is taken for granted.
        layout_reason = sm90.arrays_refusal(query, key, value)
        if layout_reason:
            return layout_reason
        stream = library.stream(query.device)
        inputs = (query, key, value)
        launch, used_seed = self._launch(problem, table, budget, inputs, seed, stream)
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
        reading = Later(lambda: _Reading(launch, library.pointer(kept), query.device, kept))
        whole = _Whole(problem, table, budget, reading)
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
        stream: int,
    ) -> tuple[FarLaunch, int]:
        device = arrays[0].device
        known_by: Hashable = (
            tuple(array[1:] for array in arrays),
            (problem.mask.right, problem.mask.alignment, problem.scale),
            table,
            (budget.rel, budget.rows, budget.confidence),
            seed,
        )
        found = self._launches.get(known_by)
        if found is None:
            used = seed if seed is not None else int(np.random.default_rng().integers(2**48))
            launch = FarLaunch(
                geometry(problem, table, budget),
                problem.dtype,
                problem.scale,
                table,
                budget,
                used,
                device,
                stream,
            )
            found = launch, used
            self._launches.put(known_by, found)
        return found


def refusal(
    problem: AttentionProblem, table: DecisionTable, budget: ErrorBudget, device: int
) -> str:
    """Why a problem is not planned on the device; empty if it is."""
    mask = problem.mask
    kinds = {candidate.plan.structure.kind for candidate in table.candidates}
    span = problem.sequences[0] if problem.sequences else None
    if driver.device_facts(device).arch != "sm_90a":
        return "the planning kernels are Hopper's"
    if problem.dtype not in ("bf16", "f16"):
        return f"dtype {problem.dtype}: planned on the device in 16-bit formats only"
    if budget.rel < LEAST_REL:
        return f"rel={budget.rel}: below {LEAST_REL} formats wider than 16 bits may be needed"
    if not mask.is_structural or mask.left is not None or mask.right not in (None, 0):
        return f"{mask.describe()} mask: causal or none are planned on the device"
    if mask.lengths is not None or mask.cu_seqlens_q is not None:
        return "sequences of their own lengths are not planned on the device"
    if span is None or span.len_kv < LEAST_KEYS or span.len_q < LEAST_KEYS:
        return f"shorter than {LEAST_KEYS} queries and keys"
    if mask.right == 0 and _offset(problem) < 0:
        return "more queries than keys under a causal mask"
    if kinds - {"landmark"}:
        return f"structures {sorted(kinds - {'landmark'})}"
    if certifying_rows(span.len_q, budget, retried=bool(table.candidates)) is None:
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
        drawn=certifying_rows(problem.len_q, budget, retried=bool(table.candidates)) or 0,
    )  # fmt: skip


def _offset(problem: AttentionProblem) -> int:
    """Return how far a causal row sees beyond its own number."""
    mask = problem.mask
    bottom = mask.right == 0 and mask.alignment == "bottom_right"
    return problem.len_kv - problem.len_q if bottom else 0


class _Reading:
    """The figures that a call keeps, read from the device at once."""

    def __init__(self, launch: FarLaunch, address: int, device: int, owner: Any) -> None:
        del owner  # the array whose memory this is: alive until here
        layout, g = launch.kept, launch.geometry
        raw = driver.read(address, layout.size, device)

        def part(name: str, dtype: Any, *shape: int) -> NDArray[Any]:
            first, _ = layout.parts[name]
            count = int(np.prod(shape))
            return np.frombuffer(raw, dtype, count, first).reshape(shape)

        heads = (g.batch, g.heads_q)
        self.certificates = part("certificates", CERTIFICATE, *heads)
        self.kept = part("kept", np.uint64, *heads)
        self.decisions = part("decisions", DECISION, *heads) if launch.levels else None
        self.decision = part("decision", np.int32, *heads) if launch.levels else None
        self.geometry = g


class _Whole:
    """What the host says of a call, from what it read."""

    def __init__(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        reading: Later[_Reading],
    ) -> None:
        self._table, self._budget, self._reading = table, budget, reading
        self._heads = list(problem.heads())
        self._visible = problem.visible_scores(0) if problem.sequences else 0
        self._sizes = (problem.len_q, problem.len_kv, problem.dim_qk, problem.dim_v)

    def plans(self) -> Mapping[HeadIndex, HeadPlan]:
        """Return what ran in the end."""
        read, table = self._reading(), self._table
        out = {}
        for index in self._heads:
            if read.decisions is None:
                reason = "dense: nothing could be cheaper at this size"
                out[index] = _with_reason(table.fallback, reason)
                continue
            choice = read.decisions[index]["choice"]
            plan = table.head_plan(choice)
            if read.certificates[index]["rounds"] > 1:
                first = float(read.certificates[index]["first_upper"])
                plan = _with_reason(
                    table.fallback,
                    f"escalated: {plan.structure.kind} certified {first:.3g} only",
                )
            elif choice["candidate"] >= 0 and _dense(read, index):
                plan = _with_reason(table.fallback, "dense: no room for its landmarks")
            elif plan.structure.kind != "dense":
                measures = read.decisions[index]["measures"]
                plan = _with_reason(
                    plan,
                    f"{plan.reason} (entropy {measures['entropy_relative']:.2f},"
                    f" |s| {measures['score_max_abs']:.0f},"
                    f" saturation {measures['saturation']:.2f})",
                )
            out[index] = plan
        return out

    def certificates(self) -> Mapping[HeadIndex, HeadCertificate]:
        """Return the sentence of every head."""
        read, budget = self._reading(), self._budget
        out = {}
        for index in self._heads:
            found = read.certificates[index]
            upper = float(found["upper"])
            oracle = float(found["oracle"])
            out[index] = HeadCertificate(
                "sampled",
                upper,
                rows=budget.rows,
                confidence=budget.confidence,
                estimate=float(found["estimate"]),
                terms={"sampled": max(upper - oracle, 0.0), "oracle": oracle},
                nonfinite=bool(found["nonfinite"]),
            )
        return out

    def stats(self) -> Mapping[HeadIndex, HeadStats]:
        """Return what was measured; nothing but sizes where nothing was."""
        read = self._reading()
        len_q, len_kv, dim_qk, dim_v = self._sizes
        out = {}
        for index in self._heads:
            facts: dict[str, Any] = {}
            if read.decisions is not None:
                m = read.decisions[index]["measures"]
                g = read.geometry
                facts = {
                    "entropy_relative": float(m["entropy_relative"]),
                    "entropy": float(m["entropy_relative"]) * float(np.log(max(len_kv, 2))),
                    "saturation": float(m["saturation"]),
                    "score_max_abs": float(m["score_max_abs"]),
                    "output_rms_estimate": float(m["output_rms"]),
                    "sampled_rows": g.samples * 2,
                    "structures": tuple(
                        StructureEstimate(
                            candidate.plan.structure,
                            min(float(m["share"][k]), 1.0),
                            0,
                            float(m["error"][k]),
                            float("nan"),
                        )
                        for k, candidate in enumerate(self._table.candidates)
                    ),
                }
            out[index] = HeadStats(
                len_q=len_q, len_kv=len_kv, dim_qk=dim_qk, dim_v=dim_v,
                visible=self._visible, nonfinite=bool(read.certificates[index]["nonfinite"]),
                **facts,
            )  # fmt: skip
        return out

    def facts(self) -> Mapping[HeadIndex, RunFacts]:
        """Return what the run found out."""
        read = self._reading()
        out = {}
        for index in self._heads:
            found = read.certificates[index]
            escalated = int(found["rounds"]) > 1
            dense = escalated or _dense(read, index)
            share = 1.0 if dense else float(read.kept[index]) / max(self._visible, 1)
            out[index] = RunFacts(
                share=min(share, 1.0),
                dropped_mass_upper=0.0 if dense else float("inf"),
                keys_max=self._sizes[1],
                output_rms=float(found["rms"]),
                nonfinite=bool(found["nonfinite"]),
            )
        return out

    def escalated(self) -> dict[str, list[str]]:
        """Return which heads ran again, and how."""
        rounds = self._reading().certificates["rounds"]
        dense = self._table.fallback
        return {
            f"{sequence},{head}": [f"dense {dense.qk}/{dense.pv}"]
            for sequence, head in self._heads
            if rounds[sequence, head] > 1
        }


def _dense(read: _Reading, index: HeadIndex) -> bool:
    """Whether a head's first run was dense."""
    return read.decision is None or bool(read.decision[index] < 0)


def _with_reason(plan: HeadPlan, reason: str) -> HeadPlan:
    return replace(plan, reason=reason)
