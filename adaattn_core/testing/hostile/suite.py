"""The laws as tests: what is drawn for each, and what is done with it.

`LAWS` is what ``tests/fuzz`` and ``python -m adaattn_core.testing.hostile`` both run: each law
draws hostile calls, makes them, judges the answers and writes counts into a `Ledger`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.backend import Backend
from adaattn_core.errors import AdaAttnError, UnsupportedError
from adaattn_core.files import atomic_write_text
from adaattn_core.result import AttentionResult
from adaattn_core.scores import SINKS, SOFTCAP
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.hostile.calls import HostileCall, hostile_calls, out_of
from adaattn_core.testing.hostile.laws import (
    Lie,
    Located,
    Trial,
    binomial_excess,
    exact_heads,
    judge,
    judge_refusal,
    judge_rows,
    judge_same,
    judge_same_bounds,
)
from adaattn_core.testing.hostile.problems import (
    HostileArrays,
    HostileMask,
    HostileProblem,
    hostile_problems,
)
from adaattn_core.testing.hostile.values import Fill

Case = tuple[HostileProblem, HostileCall]

UNLIKELY = 1e-9
"""Failures that an honest certificate would show this rarely are called a lie."""


@dataclass(eq=False)
class Ledger:
    """Counts of a run.

    Attributes
    ----------
    examples : Counter of law
        Examples drawn.
    calls : Counter of law
        Calls made of them.
    refused : Counter of the class of a documented error
    trials : Counter of (law, confidence, held)
        Certificates that were compared with the truth; those of confidence 1 by the head.
    """

    examples: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    trials: Counter[tuple[str, float, bool]] = field(default_factory=Counter)

    def add(self, trials: Iterable[Trial]) -> None:
        """Count trials."""
        self.trials.update((t.law, t.confidence, t.held) for t in trials)

    def check_shares(self) -> None:
        """Promises with a stated probability fail no more often than they say.

        Raises
        ------
        Lie
            If so many failures are less likely than `UNLIKELY`.
        """
        for law, confidence in sorted({key[:2] for key in self.trials}):
            failed = self.trials[law, confidence, False]
            count = failed + self.trials[law, confidence, True]
            if confidence < 1 and binomial_excess(count, failed, confidence) < UNLIKELY:
                raise Lie(f"{law} of confidence {confidence}: {failed} of {count} did not hold")

    def merge(self, other: Ledger) -> None:
        """Add the counts of another ledger."""
        self.examples += other.examples
        self.calls += other.calls
        self.refused += other.refused
        self.trials += other.trials

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_json` inverts it."""
        return {
            "examples": dict(self.examples),
            "calls": dict(self.calls),
            "refused": dict(self.refused),
            "trials": [[*key, n] for key, n in sorted(self.trials.items())],
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Ledger:
        """Invert `to_json`."""
        trials = {(law, float(c), bool(held)): n for law, c, held, n in body["trials"]}
        examples, calls, refused = (Counter(body[n]) for n in ("examples", "calls", "refused"))
        return cls(examples, calls, refused, Counter(trials))

    def save(self, path: Path, **facts: Any) -> None:
        """Write counts and facts; the file appears whole or not at all."""
        atomic_write_text(path, json.dumps(facts | self.to_json(), indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Run:
    """Where the calls of a law go, and where they are counted.

    Attributes
    ----------
    law : str
    backend : Backend or str
    ledger : Ledger
    home : ArrayHome
        Library and device of the arrays that are handed over.
    offered : tuple of str
        Dtypes that the backend takes; calls with others must be refused, whatever they ask.
        One that computes in float32 at most may refuse scales beyond its range besides.
    bitwise : bool
        Whether what nobody sees may not change a bit. Else both answers are judged, and their
        bounds compared: a row that was repaired because of a hidden NaN is computed in another
        order.
    rules : tuple of str
        Score rules that the backend knows; it may refuse others.
    """

    law: str
    backend: Backend | str = "numpy"
    ledger: Ledger = field(default_factory=Ledger)
    home: ArrayHome = field(default_factory=ArrayHome)
    offered: tuple[str, ...] = ("f16", "bf16", "f32", "f64")
    bitwise: bool = True
    rules: tuple[str, ...] = (SOFTCAP, SINKS)

    def takes(self, problem: HostileProblem) -> bool:
        """Whether the backend claims a problem's dtypes, its mask's, its rules and scales."""
        used = {problem.dtype} | ({problem.mask.bias_dtype} if problem.mask.bias else set())
        ordinary = problem.scale is None or 1e-36 < abs(problem.scale) < 1e36
        if problem.softcap is not None:
            scale = problem.dim_qk**-0.5 if problem.scale is None else problem.scale
            ordinary &= 1e-36 < scale / problem.softcap < 1e36
        asked = {SOFTCAP} if problem.softcap is not None else set()
        asked |= {SINKS} if problem.sinks else set()
        known = asked <= set(self.rules)
        return known and used <= set(self.offered) and (ordinary or "f64" in self.offered)

    def call(
        self, case: Case, arrays: HostileArrays, **replaced: Any
    ) -> AttentionResult | None:
        """Make a call and count it; None if it was refused as documented."""
        problem, call = case
        self.ledger.calls[self.law] += 1
        before = arrays.content()
        try:
            result = call.run(problem, arrays, self.backend, self.home, **replaced)
            dict(result.certificate.heads)  # made when somebody looks
        except AdaAttnError as error:
            if self.takes(problem) or not isinstance(error, UnsupportedError):
                judge_refusal(call, error)
            self.ledger.refused[type(error).__name__] += 1
            return None
        if arrays.content() != before:
            raise Lie("the caller's arrays were written to")
        return result


@dataclass(frozen=True, slots=True)
class Law:
    """A promise: what is drawn to break it, how it is judged, and its share of a run.

    Attributes
    ----------
    promise : str
    cases : strategy
    check : callable of (Run, case)
        Raises `Lie`.
    share : float
        Of the examples of a deep run.
    """

    promise: str
    cases: st.SearchStrategy[Any]
    check: Callable[[Run, Any], None]
    share: float

    def attack(self, run: Run, case: Any) -> None:
        """Judge one example."""
        run.ledger.examples[run.law] += 1
        self.check(run, case)


def _certificates(run: Run, case: Case) -> None:
    problem, call = case
    arrays = problem.build()
    result = run.call(case, arrays)
    if result is not None:
        run.ledger.add(judge(problem, arrays, call, result))


def _hidden_keys(run: Run, case: Case) -> None:
    problem, call = case
    arrays = problem.build()
    result = run.call(case, arrays)
    if result is None:
        return
    run.ledger.add(judge(problem, arrays, call, result))
    twin = replace(problem, hidden="same")
    other = run.call((twin, call), twin.build())
    if other is None:
        raise Lie("refused when hidden keys hold something else")
    what = f"hidden keys hold {problem.hidden!r} instead of ordinary numbers"
    if run.bitwise:
        judge_same(result, other, what)
    else:
        run.ledger.add(judge(twin, twin.build(), call, other))
        judge_same_bounds(result, other, what)


def _causality(run: Run, case: tuple[HostileProblem, HostileCall, int, str]) -> None:
    problem, call, number, what = case
    arrays = problem.build()
    if not arrays.key.size:
        return
    changed = _with_another_key(arrays, number, what)
    results = [run.call((problem, call), a) for a in (arrays, changed.arrays)]
    if results[0] is None or results[1] is None:
        if results[0] is not results[1]:
            raise Lie(f"a key became {what!r}: one of the two calls is refused")
        return
    run.ledger.add(judge(problem, changed.arrays, call, results[1]))
    outs = [out_of(r, problem) for r in results if r is not None]
    for located in exact_heads(problem, arrays):
        blind = changed.unseen_by(located, problem.group)
        before, after = (out[located.where][blind] for out in outs)
        if changed.finite and before.tobytes() != after.tobytes():
            raise Lie(f"a key became {what!r}: a row that does not see it changed")
        if not changed.finite:  # the rest may be computed otherwise, but not worse
            judge_rows(located, results[0].certificate[located.index], outs, blind)


@dataclass(frozen=True, slots=True)
class _Changed:
    """Arrays in which one key and its value were changed."""

    arrays: HostileArrays
    batch: int
    head_kv: int
    position: int
    finite: bool

    def unseen_by(self, located: Located, group: int) -> NDArray[np.bool_]:
        """Rows of a head that do not see the changed key."""
        span, (_, head) = located.span, located.index
        mine = (span.batch, head // group) == (self.batch, self.head_kv)
        if not (mine and span.k0 <= self.position < span.k1):
            return np.ones(span.q1 - span.q0, bool)
        return ~located.exact.visible[:, self.position - span.k0]


def _with_another_key(arrays: HostileArrays, number: int, what: str) -> _Changed:
    key, value = arrays.key.copy(), arrays.value.copy()
    place = np.unravel_index(number % math.prod(key.shape[:3]), key.shape[:3])
    for x in (key, value):
        x[place] = x[place][::-1] / 2 if what == "other" else float(what)
    batch, head_kv, position = (int(i) for i in place)
    finite = what not in ("nan", "inf")
    return _Changed(replace(arrays, key=key, value=value), batch, head_kv, position, finite)


def _replay(run: Run, case: Case) -> None:
    problem, call = case
    arrays = problem.build()
    result = run.call(case, arrays)
    if result is None:
        return
    again = replace(call, how="frozen")
    second = run.call((problem, again), arrays, plan=result.plan)
    if second is None:
        raise Lie("a plan that ran is refused when it is handed in")
    judge_same(result, second, "the same plan again", certificates=False)


# A head that sees NaN or Inf may run dense: bits can be compared where nothing changes that.
_CHANGES = st.sampled_from(("other", "0", "1", "nan", "inf"))
_CALM = st.sampled_from(
    (Fill(), Fill("sparse"), Fill("equal"), Fill("rows", -3), Fill("rows", 3))
)
_FROZEN_EXACT = st.builds(
    lambda structure, formats, saved: HostileCall(
        how="frozen",
        head={"structure": structure, "qk": formats[0], "pv": formats[1]},
        saved=saved,
    ),
    st.sampled_from(
        (
            {"kind": "dense"},
            {"kind": "score_skip", "lam": 1e-3, "tile_q": 1, "tile_kv": 4},
            {
                "kind": "block_sparse",
                "tile_q": 4,
                "tile_kv": 4,
                "group": 4,
                "blocks": {"seed": 0, "share": 0.7},
            },
        )
    ),
    st.sampled_from((("f32", "f32"), ("f64", "f64"), ("f16", "f16"), ("tf32", "bf16"))),
    st.booleans(),
)
_CAUSAL_MASKS = st.builds(
    HostileMask,
    window=st.sampled_from(((None, 0), (3, 0), (None, 0), (5, 5))),
    alignment=st.sampled_from(("top_left", "bottom_right")),
    lengths=st.sampled_from(("full", "ragged", "lengths")),
    bias=st.sampled_from(("", "", "normal", "fill")),
    hide=st.sampled_from((0.0, 0.3)),
)

# Shares low enough for samples of a few rows, errors too large for a theorem to step in.
_SAMPLED = st.builds(
    lambda call, rel, rows: replace(call, budget=call.budget | {"rel": rel, "rows": rows}),
    hostile_calls(
        hows=("frozen", "fixed", "budget", "entropy"),
        guarantees=("sampled",),
        odd=False,
        no_budget=False,
    ),
    st.sampled_from((1e-12, 1e-6, 1e-3, 0.1)),
    st.sampled_from((0.1, 0.2, 0.3, 0.5)),
)
_PROBABILISTIC = st.builds(
    lambda call, qk: replace(
        call, head=call.head | {"qk": qk, "pv": "f32", "rounding": "stochastic"}
    ),
    hostile_calls(
        hows=("frozen", "fixed"), guarantees=("probabilistic",), odd=False, no_budget=False
    ),
    st.sampled_from(("i8", "e4m3")),
)

LAWS: dict[str, Law] = {
    "certificates": Law(
        "Every answer is finite or flagged, certified or refused; every row is where its"
        " certificate says.",
        st.tuples(hostile_problems(), hostile_calls()),
        _certificates,
        0.55,
    ),
    "shares": Law(
        "Certificates with a stated confidence hold as often as they say.",
        st.tuples(
            hostile_problems(poison=False, lengths=range(20, 41)),
            st.one_of(_SAMPLED, _SAMPLED, _PROBABILISTIC),
        ),
        _certificates,
        0.2,
    ),
    "hidden keys": Law(
        "What nobody sees changes nothing: no output, no bound.",
        st.tuples(
            hostile_problems().map(
                lambda p: replace(p, hidden="mixed") if p.hidden == "same" else p
            ),
            hostile_calls(odd=False),
        ),
        _hidden_keys,
        0.1,
    ),
    "causality": Law(
        "A row does not change, bit for bit, when a key that it does not see does.",
        st.tuples(
            hostile_problems(masks=_CAUSAL_MASKS, values=_CALM, scales=(None,), poison=False),
            _FROZEN_EXACT,
            st.integers(0, 10**6),
            _CHANGES,
        ),
        _causality,
        0.1,
    ),
    "replay": Law(
        "A plan that ran gives the same bits again.",
        st.tuples(hostile_problems(), hostile_calls(odd=False)),
        _replay,
        0.05,
    ),
}
