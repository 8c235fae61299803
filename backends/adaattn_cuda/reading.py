"""Reading back what a call on the device decided, ran and certified, once somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import HeadCertificate
from adaattn_core.facts import RunFacts
from adaattn_core.lazy import Later
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats, StructureEstimate
from adaattn_cuda.device import driver
from adaattn_cuda.planner.launch import FarLaunch
from adaattn_cuda.planner.layout import CERTIFICATE, DECISION
from adaattn_cuda.work.far import WIDE

__all__ = ["Reading", "Whole"]


class Reading:
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
        measured = launch.levels and launch.decided is None
        self.decisions = part("decisions", DECISION, *heads) if measured else None
        self.decision = part("decision", np.int32, *heads) if launch.levels else None
        self.geometry = g


class Whole:
    """What the host says of a call, from what it read."""

    def __init__(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        reading: Later[Reading],
        given: Plan | None,
    ) -> None:
        self._table, self._budget, self._reading, self._given = table, budget, reading, given
        self._heads = list(problem.heads())
        self._visible = problem.visible_scores(0) if problem.sequences else 0
        self._sizes = (problem.len_q, problem.len_kv, problem.dim_qk, problem.dim_v)

    def plans(self) -> Mapping[HeadIndex, HeadPlan]:
        """Return what ran in the end."""
        read, table = self._reading(), self._table
        out = {}
        for index in self._heads:
            plan = self._decided(read, index)
            if read.certificates[index]["rounds"] > 1:
                first = float(read.certificates[index]["first_upper"])
                plan = _with_reason(
                    table.fallback,
                    f"escalated: {_kind(plan, read, index, table)} certified {first:.3g} only",
                )
            elif plan.structure.kind != "dense" and _dense(read, index):
                first_plan = table.narrow or table.fallback
                plan = _with_reason(first_plan, "dense: no room for its landmarks")
            elif plan.structure.kind != "dense" and read.decisions is not None:
                measures = read.decisions[index]["measures"]
                plan = _with_reason(
                    plan,
                    f"{plan.reason} (entropy {measures['entropy_relative']:.2f},"
                    f" |s| {measures['score_max_abs']:.0f},"
                    f" saturation {measures['saturation']:.2f})",
                )
            out[index] = plan
        return out

    def _decided(self, read: Reading, index: HeadIndex) -> HeadPlan:
        """Return what was decided for a head before it ran."""
        if self._given is not None:
            return self._given[index]
        if read.decisions is None:
            reason = "dense: nothing could be cheaper at this size"
            return _with_reason(self._table.narrow or self._table.fallback, reason)
        if read.decision is not None and read.decision[index] == WIDE:
            return _with_reason(self._table.fallback, "dense: its scores are too large for i8")
        return self._table.head_plan(read.decisions[index]["choice"])

    def certificates(self) -> Mapping[HeadIndex, HeadCertificate]:
        """Return the sentence of every head."""
        read, budget = self._reading(), self._budget
        out = {}
        for index in self._heads:
            found = read.certificates[index]
            upper = float(found["upper"])
            if found["proved"]:
                out[index] = HeadCertificate(
                    "worst_case", upper, rows=1.0, confidence=1.0, terms={"arithmetic": upper},
                    nonfinite=bool(found["nonfinite"]),
                )  # fmt: skip
                continue
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


def _dense(read: Reading, index: HeadIndex) -> bool:
    """Whether a head's first run was dense."""
    return read.decision is None or bool(read.decision[index] < 0)


def _kind(plan: HeadPlan, read: Reading, index: HeadIndex, table: DecisionTable) -> str:
    """Return what a head ran as first: its structure, and formats of 8 bits."""
    if plan.structure.kind != "dense" and not _dense(read, index):
        return plan.structure.kind
    return f"dense {table.narrow.qk}/{table.narrow.pv}" if table.narrow else "dense"


def _with_reason(plan: HeadPlan, reason: str) -> HeadPlan:
    return replace(plan, reason=reason)
