"""Backends broken on purpose: each must fail the kit, or the kit is not worth running.

``--adaattn-sabotage NAME`` wraps the backend under test, so that every author can see the kit
bite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn_core.arrays import to_numpy
from adaattn_core.backend import Backend, Capabilities, Measures
from adaattn_core.facts import RawResult, RowErrors, RunFacts
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import MeasureRequest, ProblemStats

Before = Callable[[AttentionProblem], AttentionProblem]
After = Callable[[AttentionProblem, RawResult], None]
Errors = Callable[[RowErrors], RowErrors]


@dataclass(frozen=True, slots=True)
class Sabotage:
    """One way of being wrong.

    Attributes
    ----------
    says : str
        What is broken, in a phrase.
    caught_by : str
        Name of a law (a test function of the kit) that must fail.
    before : callable
        Changes the problem that the honest backend then computes.
    after : callable
        Changes the result in place.
    errors : callable
        Changes the sampled row errors.
    """

    says: str
    caught_by: str
    before: Before = lambda problem: problem
    after: After = lambda problem, raw: None
    errors: Errors = lambda errors: errors


@dataclass
class SabotagedBackend:
    """An honest backend behind a liar; arrays must be in host memory."""

    inner: Backend
    how: Sabotage
    name: str

    def capabilities(self) -> Capabilities:
        """Return what the honest backend offers."""
        return self.inner.capabilities()

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Run the changed problem, then change the result."""
        raw = self.inner.run(self.how.before(problem), plan, heads=heads, into=into)
        self.how.after(problem, raw)
        return raw

    def provenance(self) -> dict[str, str]:
        """Return the honest provenance and the sabotage."""
        return {**self.inner.provenance(), "sabotage": self.how.says}


@dataclass
class SabotagedMeasures(SabotagedBackend):
    """The same behind a backend that `Measures`."""

    measuring: Measures

    def measure(
        self, problem: AttentionProblem, request: MeasureRequest
    ) -> tuple[ProblemStats, Any]:
        """Measure honestly, but hand out no workspace: the run sees another problem."""
        return self.measuring.measure(problem, request)[0], None

    def row_errors(
        self,
        problem: AttentionProblem,
        raw: RawResult,
        rows: Mapping[HeadIndex, NDArray[Any]],
        *,
        enough: float = 0.0,
    ) -> dict[HeadIndex, RowErrors]:
        """Change what the honest comparison found."""
        found = self.measuring.row_errors(problem, raw, rows, enough=enough)
        return {index: self.how.errors(errors) for index, errors in found.items()}


def sabotage(name: str, inner: Backend) -> SabotagedBackend:
    """Wrap a backend by the name of a sabotage in `SABOTAGES`."""
    how = SABOTAGES[name]
    if isinstance(inner, Measures):
        return SabotagedMeasures(inner, how, inner.name, inner)
    return SabotagedBackend(inner, how, inner.name)


def _scale_off(problem: AttentionProblem) -> AttentionProblem:
    return replace(problem, scale=1.01 * problem.scale)


def _drop_a_key(problem: AttentionProblem) -> AttentionProblem:
    """Hide the middle key of every sequence from every row."""
    hidden = [s.kv_start + s.len_kv // 2 for s in problem.sequences if s.len_kv]
    allowed = np.ones((problem.batch, problem.heads_q, problem.len_q, problem.len_kv), bool)
    if problem.mask.allowed is not None:
        allowed &= to_numpy(problem.mask.allowed)
    for span, key in zip((s for s in problem.sequences if s.len_kv), hidden, strict=True):
        allowed[span.batch, :, span.q_start : span.q_stop, key] = False
    merged = replace(problem.mask, allowed=None) & Mask.boolean(allowed)
    return replace(problem, mask=merged)


def _halve_facts(problem: AttentionProblem, raw: RawResult) -> None:
    for index, facts in raw.facts.items():
        raw.facts[index] = replace(
            facts,
            **{
                f.name: getattr(facts, f.name) / 2
                for f in fields(RunFacts)
                if f.name.endswith("_upper")
            },
        )


def _halve_errors(errors: RowErrors) -> RowErrors:
    return replace(errors, error=errors.error / 2)


def _leak_padding(problem: AttentionProblem, raw: RawResult) -> None:
    """Add ``0 * value`` of keys that nobody sees, as a careless P·V does."""
    value = to_numpy(problem.value).astype(np.float64)
    with np.errstate(invalid="ignore"):
        leaked = np.repeat((0 * value).sum(axis=2, keepdims=True), problem.group_size, axis=1)
    raw.out += leaked.astype(raw.out.dtype)


def _hide_nonfinite(problem: AttentionProblem, raw: RawResult) -> None:
    np.nan_to_num(raw.out, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    for index, facts in raw.facts.items():
        raw.facts[index] = replace(facts, nonfinite=False)


def _shift_lse(problem: AttentionProblem, raw: RawResult) -> None:
    raw.lse += np.float32(0.01)


def _reverse_pages(problem: AttentionProblem) -> AttentionProblem:
    """Read every row of the page table from its end."""
    paged = problem.paged
    if paged is None:
        return problem
    table = np.array(paged.table)
    for b in range(paged.batch):
        for h in range(paged.heads_kv):
            used = paged.used_pages(b, h)
            first = int(paged.starts[b]) // paged.page_len
            table[b, h, first : first + len(used)] = used[::-1]
    return replace(problem, paged=replace(paged, table=table))


class _Restless:
    """Changes the last bit of the output on every other call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, problem: AttentionProblem, raw: RawResult) -> None:
        self.calls += 1
        if self.calls % 2 and raw.out.size:
            raw.out[...] = np.nextafter(raw.out, raw.out.dtype.type(np.inf))


def _scribble(problem: AttentionProblem) -> AttentionProblem:
    """Scale the caller's own queries in place."""
    to_numpy(problem.query)[...] *= 2
    return replace(problem, scale=problem.scale / 2)


SABOTAGES: dict[str, Sabotage] = {
    "wrong_scale": Sabotage("scale 1% too large", "test_within_twice_naive", before=_scale_off),
    "dropped_key": Sabotage("one key ignored", "test_worst_case_holds", before=_drop_a_key),
    "bound_halved": Sabotage(
        "facts and sampled errors halved",
        "test_facts_cover_the_truth",
        after=_halve_facts,
        errors=_halve_errors,
    ),
    "leaky_padding": Sabotage(
        "0 * NaN of unseen values added",
        "test_unseen_nonfinite_never_leaks",
        after=_leak_padding,
    ),
    "hidden_nonfinite": Sabotage(
        "NaN and Inf replaced and not reported",
        "test_visible_nonfinite_is_reported",
        after=_hide_nonfinite,
    ),
    "wrong_lse": Sabotage("lse off by 0.01", "test_lse_is_right", after=_shift_lse),
    "reversed_pages": Sabotage(
        "pages read in reverse", "test_paged_worst_case_holds", before=_reverse_pages
    ),
    "ignored_softcap": Sabotage(
        "a softcap ignored",
        "test_rules_within_twice_naive",
        before=lambda problem: replace(problem, softcap=None),
    ),
    "ignored_sinks": Sabotage(
        "sinks ignored",
        "test_rules_within_twice_naive",
        before=lambda problem: replace(problem, sinks=None),
    ),
    "restless": Sabotage(
        "last bit changes from call to call", "test_two_runs_are_equal", after=_Restless()
    ),
    "scribbler": Sabotage(
        "the caller's queries are overwritten",
        "test_inputs_stay_as_they_were",
        before=_scribble,
    ),
}
"""Every sabotage by name."""
