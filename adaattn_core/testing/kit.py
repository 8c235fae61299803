"""What the laws speak to: the backend under test, where its arrays live, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.api import attention
from adaattn_core.backend import Backend, Capabilities, Measures, Samples
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RunFacts
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.result import AttentionResult
from adaattn_core.structure import Landmark, Structure
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.oracles import (
    ExactAttention,
    exact_attention,
    rms_row_norm,
    row_errors,
)
from adaattn_core.testing.strategies import (
    STORAGES,
    MaskSpec,
    ProblemSpec,
    mask_specs,
    problem_specs,
)

WORST_CASE = ErrorBudget(
    rel=1e300, rows=1.0, confidence=1.0, guarantee="worst_case", on_violation="report"
)
"""Asks for a theorem and accepts whatever it says."""

_NATURAL_DTYPE = {"f64": "f64", "f32": "f32", "tf32": "f32", "f16": "f16"}
_MASK_ARRAYS = ("boolean", "additive")
_DIM_CANDIDATES = (1, 2, 3, 7, 8, 16, 24, 33, 40, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run returned, in host memory.

    Attributes
    ----------
    out : ndarray of float64, shape (batch, heads_q, len_q, dim_v)
        Widened exactly.
    lse : ndarray of float64, shape (batch, heads_q, len_q)
    facts : dict of (sequence, head) to RunFacts
    raw : RawResult
    """

    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    facts: dict[HeadIndex, RunFacts]
    raw: RawResult


class Kit:
    """The backend under test.

    Parameters
    ----------
    name : str
        Under which the registry knows it.
    home : ArrayHome
        Where it wants its arrays.
    """

    def __init__(self, name: str, home: ArrayHome) -> None:
        self.name = name
        self.home = home
        self._accepted: dict[tuple[Any, ...], bool] = {}

    def __repr__(self) -> str:
        return f"Kit({self.name!r})"

    @property
    def backend(self) -> Backend:
        """The backend itself."""
        return get_backend(self.name)

    @property
    def capabilities(self) -> Capabilities:
        """What it says it can do."""
        return self.backend.capabilities()

    # -- what the backend takes ---------------------------------------------------------------
    def require(
        self,
        *,
        qk: str | None = None,
        pv: str | None = None,
        structure: str | None = None,
        masks: Sequence[str] = (),
    ) -> None:
        """Skip the test unless the backend claims all this; the reason names the gap."""
        can = self.capabilities
        wanted = (
            ("qk format", qk, can.qk_formats),
            ("pv format", pv, can.pv_formats),
            ("structure", structure, can.structures),
            *(("mask", name, can.masks) for name in masks),
        )
        for what, name, offered in wanted:
            if name is not None and name not in offered:
                pytest.skip(f"backend {self.name} does not offer {what} {name}")

    def sampling(self) -> Samples:
        """Return the backend as one that `Samples`; skip the test where it does not."""
        backend = self.backend
        if not isinstance(backend, Samples):
            pytest.skip(f"backend {self.name} compares no rows")
        return backend

    def measuring(self) -> Measures:
        """Return the backend as one that `Measures`; skip the test where it does not."""
        backend = self.backend
        if not isinstance(backend, Measures):
            pytest.skip(f"backend {self.name} measures nothing")
        return backend

    def sized(self, structure: Structure) -> Structure:
        """Return a structure as far as the backend runs it.

        A backend whose `Capabilities.sizes` name landmarks says with them whether it splits
        queries into clusters, and which screens it has.
        """
        offered = next((s for s in self.capabilities.sizes if s.kind == structure.kind), None)
        if isinstance(structure, Landmark) and isinstance(offered, Landmark):
            return replace(
                structure, clusters=offered.clusters, screen_rank=offered.screen_rank
            )
        return structure

    def head(self, qk: str | None = None, pv: str | None = None, **fields: Any) -> HeadPlan:
        """Return a head plan, a format left open filled in with a companion.

        A format wider than 8 bits goes with itself; an 8-bit one with the narrowest
        wider one.
        With neither given: the widest that the backend offers up to f32, else f64.
        """
        can = self.capabilities
        if qk is None and pv is None:
            both = [f for f in can.qk_formats if f in can.pv_formats]
            order = ["f32", "f64", "tf32", "f16", "bf16"]
            name = next((f for f in order if f in both), None)
            if name is None:
                pytest.skip(f"backend {self.name} offers no format wider than 8 bits for both")
            return HeadPlan(qk=name, pv=name, **fields)
        given, offered = (qk, can.pv_formats) if qk is not None else (pv, can.qk_formats)
        wide = given in ("f64", "f32", "tf32", "f16", "bf16")
        order = [str(given)] if wide else ["bf16", "f16", "tf32", "f32", "f64"]
        other = next((f for f in order if f in offered), None)
        if other is None:
            pytest.skip(f"backend {self.name} offers no companion for {given}: {order}")
        return HeadPlan(qk=qk or other, pv=pv or other, **fields)

    def narrowest(self) -> HeadPlan:
        """Return a head plan in the narrowest format wider than 8 bits: errors to see."""
        can = self.capabilities
        order = [f for f in ("bf16", "f16", "tf32", "f32") if f in can.qk_formats]
        return self.head(qk=order[0]) if order else self.head()

    def dtype(self, plan: HeadPlan) -> str:
        """Input dtype that suits the formats of a plan."""
        return _NATURAL_DTYPE.get(plan.qk, "bf16")

    def accepts(self, spec: ProblemSpec, plan: HeadPlan) -> bool:
        """Whether a problem of this kind runs (asked once, then remembered).

        Its kind is its dtype, its dims, how its arrays lie, and which masks are arrays.
        """
        probe = ProblemSpec(
            batch=2, dtype=spec.dtype, dim_qk=spec.dim_qk, dim_v=spec.dim_v, len_q=16,
            len_kv=16, storage=spec.storage, mask=MaskSpec(arrays=spec.mask.arrays),
        )  # fmt: skip
        key = (probe, plan.qk, plan.pv, plan.structure)
        if key not in self._accepted:
            try:
                self.run(probe.build(self.home.send), plan)
                self._accepted[key] = True
            except UnsupportedError:
                self._accepted[key] = False
        return self._accepted[key]

    def takes_dtype(self, dtype: str, plan: HeadPlan) -> bool:
        """Whether plain problems of this input dtype run under a plan."""
        return self.accepts(ProblemSpec(dtype=dtype, dim_qk=64, dim_v=64), plan)

    def specs(
        self, plan: HeadPlan, *, max_dim: int = 40, **choices: Any
    ) -> st.SearchStrategy[ProblemSpec]:
        """Strategy of problems that the backend says it takes under a plan.

        Skips the running test where the backend refuses every input dtype for the plan.
        `choices` go to `problem_specs`.
        """
        dtypes = [
            d
            for d in choices.pop("dtypes", ("f64", "f32", "f16", "bf16"))
            if self.takes_dtype(d, plan)
        ]
        if not dtypes:
            pytest.skip(
                f"backend {self.name} refuses every input dtype for {plan.qk}/{plan.pv}"
            )
        dims = [
            d
            for d in _DIM_CANDIDATES
            if d <= max_dim
            and all(self.accepts(ProblemSpec(dtype=t, dim_qk=d, dim_v=d), plan) for t in dtypes)
        ] or [64]
        plain = ProblemSpec(dtype=dtypes[0], dim_qk=dims[0], dim_v=dims[0])
        kinds = [
            kind
            for kind in self.capabilities.masks
            if kind not in _MASK_ARRAYS
            or self.accepts(replace(plain, mask=MaskSpec(arrays=(kind,))), plan)
        ]
        storages = [
            storage
            for storage in choices.pop("storages", STORAGES)
            if self.accepts(replace(plain, storage=storage), plan)
        ]
        if not storages:
            pytest.skip(f"backend {self.name} refuses the storage for {plan.qk}/{plan.pv}")
        masks = choices.pop("masks", None)
        drawn = mask_specs(kinds) if masks is None else masks
        return problem_specs(
            dtypes=dtypes,
            dims=st.sampled_from(dims),
            masks=drawn.filter(lambda mask: set(mask.arrays) <= set(kinds)),
            storages=storages,
            **choices,
        )

    # -- running ------------------------------------------------------------------------------
    def place(self, problem: AttentionProblem) -> AttentionProblem:
        """Move a host problem to where the backend wants its arrays."""
        if self.home.namespace is None:
            return problem
        return AttentionProblem.from_arrays(
            *(self.home.send(x) for x in (problem.query, problem.key, problem.value)),
            mask=self.home.send_mask(problem.mask),
            scale=problem.scale,
            softcap=problem.softcap,
            sinks=None if problem.sinks is None else self.home.send(problem.sinks),
        )

    def run(self, problem: AttentionProblem, head: HeadPlan, seed: int = 0) -> Outcome:
        """Run one head plan for every head, without a certificate."""
        raw = self.backend.run(problem, Plan.uniform(problem, head, seed=seed))
        return self.outcome(raw)

    def outcome(self, raw: RawResult) -> Outcome:
        """Fetch what a run returned."""
        out, lse = (self.home.fetch(x).astype(np.float64) for x in (raw.out, raw.lse))
        return Outcome(out, lse, dict(raw.facts), raw)

    def attend(
        self, problem: AttentionProblem, arrays: Sequence[Any] = (), **arguments: Any
    ) -> AttentionResult:
        """Go through the front door, ``adaattn_core.attention``, with this backend.

        `arrays` replaces query, key and value, where another layout is to be handed in.
        """
        return attention(
            *(arrays or (problem.query, problem.key, problem.value)),
            mask=problem.mask,
            scale=problem.scale,
            softcap=problem.softcap,
            sinks=problem.sinks,
            backend=self.name,
            **arguments,
        )

    def certify(
        self,
        problem: AttentionProblem,
        head: HeadPlan,
        budget: ErrorBudget = WORST_CASE,
        seed: int = 0,
    ) -> AttentionResult:
        """Run one head plan for every head, with a certificate of the budget's kind."""
        plan = Plan.uniform(problem, head, seed=seed)
        return self.attend(problem, plan=plan, budget=budget, seed=seed)


def head_rows(problem: AttentionProblem, index: HeadIndex) -> tuple[int, int, slice]:
    """Where one (sequence, head) lies in an array of shape (batch, heads_q, len_q, ...)."""
    span = problem.sequences[index[0]]
    return span.batch, index[1], slice(span.q_start, span.q_stop)


def assert_certificate_holds(
    kit: Kit,
    result: AttentionResult,
    host: AttentionProblem,
    exact: ExactAttention | None = None,
) -> float:
    """Every row errs by at most ``upper * rms|out|``, or its head says nonfinite.

    Returns
    -------
    float
        Largest error as a share of what was certified: what an adversary maximises.
    """
    closest = 0.0
    exact = exact_attention(host) if exact is None else exact
    out = kit.home.fetch(result.out).astype(np.float64)
    for index in host.heads():
        where = head_rows(host, index)
        certificate, rows = result.certificate[index], out[where]
        if not np.isfinite(rows).all():
            assert certificate.nonfinite, f"head {index}: NaN or Inf returned and not reported"
            assert certificate.upper == np.inf, f"head {index}: a bound for NaN or Inf"
            continue
        assert not certificate.nonfinite, f"head {index}: reported nonfinite, rows are finite"
        errors = row_errors(rows, exact.out[where])
        if not np.isfinite(errors).all():
            assert certificate.upper == np.inf, f"head {index}: exact rows hold NaN or Inf"
            continue
        allowed = (
            absolute_bound(certificate.upper, rms_row_norm(rows)) + exact.error_upper[index]
        )
        worst = float(errors.max(initial=0.0))
        assert worst <= allowed, (
            f"head {index}: worst row errs by {worst:.6g}, certified {allowed:.6g}"
            f" (upper {certificate.upper:.6g}, terms {dict(certificate.terms)})"
        )
        closest = max(closest, worst / allowed if allowed > 0 else 0.0)
    return closest


def assert_same_result(
    kit: Kit,
    first: AttentionResult,
    host: AttentionProblem,
    second: AttentionResult,
    other: AttentionProblem,
    heads: Mapping[HeadIndex, HeadIndex] | None = None,
) -> None:
    """Results equal in exact arithmetic differ by no more than both certificates allow.

    Parameters
    ----------
    first, host, second, other
        Two results, each followed by its problem in host memory.
    heads : mapping, optional
        Which head of `other` each head of `host` is compared with; default the same.
    """
    outs = [kit.home.fetch(r.out).astype(np.float64) for r in (first, second)]
    for index, twin in (heads or {i: i for i in host.heads()}).items():
        rows = outs[0][head_rows(host, index)], outs[1][head_rows(other, twin)]
        certificates = first.certificate[index], second.certificate[twin]
        allowed = sum(
            absolute_bound(c.upper, rms_row_norm(x))
            for c, x in zip(certificates, rows, strict=True)
        )
        worst = float(row_errors(*rows).max(initial=0.0))
        assert worst <= allowed, (
            f"head {index}: results differ by {worst:.6g}, the certificates allow {allowed:.6g}"
        )


def absolute_bound(upper: float, size: float) -> float:
    """Return ``upper * size``: inf where upper is, even for an output of zero."""
    return np.inf if upper == np.inf else upper * size
