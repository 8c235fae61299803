"""NumpyBackend: measures heads, runs plans, and compares sampled rows with exact attention."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from adaattn_core.backend import ORACLE_SHARE, Capabilities, Gradients
from adaattn_core.bounds import largest_norm_upper, rms_norm_lower
from adaattn_core.bounds.rounding import add_up, mul_up
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RowErrors, RunFacts
from adaattn_core.formats import FORMATS
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest, ProblemStats
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip
from adaattn_reference.blocks import key_blocks
from adaattn_reference.dense import HeadOutput, block_sparse, dense
from adaattn_reference.exact import errors_against
from adaattn_reference.farfield import GroupProbe
from adaattn_reference.gradient import backward
from adaattn_reference.key_values import KeyValues
from adaattn_reference.landmark import landmark
from adaattn_reference.measure import HeadProbe, measure_head
from adaattn_reference.operands import Operands, prepare_operands
from adaattn_reference.score_rule import with_sink
from adaattn_reference.score_skip import score_skip
from adaattn_reference.svd import score_factors
from adaattn_reference.threads import map_heads, thread_count
from adaattn_reference.view import HeadView, ProblemViews

Float = NDArray[np.floating[Any]]

STRUCTURES = ("dense", "score_skip", "low_rank", "block_sparse", "landmark")
FORMATS_RUN = ("f64", "f32", "tf32", "f16", "bf16", "i8", "e4m3")
"""Operand formats that plans may name here."""
OWN_SHARE = 0.2
"""Exact rows are computed in float32 where the theorem's bound on their own error is below this
share of the errors that they show (of their 90% quantile), or far below what is enough; else in
float64."""


class Workspace:
    """What `measure` leaves for `run`: operand views and probe rows by head."""

    def __init__(self, problem: AttentionProblem, seed: int, views: ProblemViews) -> None:
        self.problem = problem
        self.seed = seed
        self.views = views
        self.probes: dict[HeadIndex, HeadProbe] = {}


class NumpyBackend:
    """Every plan, on the CPU, in NumPy: emulated where the hardware has no such format."""

    name = "numpy"

    def capabilities(self) -> Capabilities:
        """Return what this backend can do: everything; only f32 and f64 run natively."""
        return Capabilities(
            qk_formats=FORMATS_RUN,
            pv_formats=FORMATS_RUN,
            structures=STRUCTURES,
            array_devices=("cpu",),
            target="cpu",
            emulated_formats=("tf32", "f16", "bf16", "i8", "e4m3"),
            rules=(
                ("softcap", ("dense", "score_skip", "low_rank", "block_sparse")),
                ("sinks", ("dense", "score_skip", "low_rank", "block_sparse", "landmark")),
            ),
            paged=STRUCTURES,
        )

    def measure(
        self, problem: AttentionProblem, request: MeasureRequest
    ) -> tuple[ProblemStats, Workspace]:
        """Measure every head; see `adaattn_core.backend.Measures.measure`."""
        workspace = Workspace(problem, request.seed, ProblemViews(problem))

        def work(index: HeadIndex) -> tuple[HeadIndex, HeadStats, HeadProbe]:
            stats, probe = measure_head(workspace.views[index], request)
            return index, stats, probe

        heads = {}
        for index, stats, probe in map_heads(work, problem.heads(), _most_scores(problem)):
            heads[index] = stats
            workspace.probes[index] = probe
        return ProblemStats(heads), workspace

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Workspace | None = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Run the plan; see `adaattn_core.backend.Backend.run`.

        Raises
        ------
        UnsupportedError
            If the landmark structure meets a mask that is neither causal nor full, or only one
            of the two products is asked for in f64.
        """
        plan.check_fits(problem)
        raw = into if into is not None else _empty_result(problem)
        todo = list(problem.heads() if heads is None else heads)
        if workspace is None or workspace.problem is not problem:
            workspace = Workspace(problem, plan.seed, ProblemViews(problem))
        raw.workspace = workspace
        views64 = ProblemViews(problem, np.float64)
        space = workspace

        def work(index: HeadIndex) -> tuple[HeadIndex, HeadOutput, RunFacts]:
            head = plan[index]
            _check_formats(head)
            # Float32 operands whose products could overflow are multiplied in float64.
            wide = head.qk == "f64" or not space.views[index].in_range
            view = (views64 if wide else space.views)[index]
            if not view.regular and head.structure != Dense():
                head = replace(head, structure=Dense())
                raw.ran_dense.add(index)
            probe = space.probes.get(index)
            usable = (
                probe is not None and space.seed == plan.seed and probe.serves(head.structure)
            )
            probes = probe.probes if probe is not None and usable else None
            output, facts = _run_head(view, head, plan.seed, probes)
            return index, output, _with_page_facts(facts, problem, index)

        todo.sort(key=lambda index: -problem.visible_scores(index[0]))
        for index, output, facts in map_heads(work, todo, _most_scores(problem)):
            span = problem.sequences[index[0]]
            rows = (span.batch, index[1], slice(span.q_start, span.q_stop))
            with np.errstate(all="ignore"):
                raw.out[rows] = output.out.astype(raw.out.dtype)
                raw.lse[rows] = _narrow(output.lse)
                raw.facts[index] = _with_output_facts(facts, raw.out[rows])
        return raw

    def row_errors(
        self,
        problem: AttentionProblem,
        raw: RawResult,
        rows: Mapping[HeadIndex, NDArray[Any]],
        *,
        enough: float = 0.0,
    ) -> dict[HeadIndex, RowErrors]:
        """Compare returned rows with exact attention of the same rows.

        The exact rows are those of float32 arithmetic where its own error, bounded by theorem 8
        and part of what is returned, hardly matters beside the errors found or what is enough,
        else of float64.
        """
        wide = ProblemViews(problem, np.float64)
        narrow = None
        if problem.dtype != "f64":
            kept = raw.workspace
            same = isinstance(kept, Workspace) and kept.problem is problem
            narrow = kept.views if same else ProblemViews(problem)

        def work(index: HeadIndex) -> tuple[HeadIndex, RowErrors]:
            span = problem.sequences[index[0]]
            chosen = np.sort(np.asarray(rows[index], np.int64))
            out = raw.out[span.batch, index[1], span.q_start + chosen].astype(np.float64)
            if narrow is not None:
                view = narrow.rows(index, chosen)
                if view.in_range:
                    errors = errors_against(view, out, _input_facts(view), problem)
                    typical = float(np.quantile(errors.error, 0.9)) if len(chosen) else 0.0
                    little = OWN_SHARE * typical
                    if enough:
                        size = raw.facts[index].output_rms
                        little = max(little, ORACLE_SHARE * enough * size)
                    if errors.oracle_upper <= little:
                        return index, errors
            view = wide.rows(index, chosen)
            return index, errors_against(view, out, _input_facts(view), problem)

        most = max(map(len, rows.values()), default=0) * problem.len_kv
        return dict(map_heads(work, rows, most))

    def backward(
        self,
        query: Any,
        key: Any,
        value: Any,
        grad_out: Any,
        *,
        out: Any = None,
        lse: Any = None,
        grad_lse: Any = None,
        mask: Mask | None = None,
        scale: float | None = None,
        need_bias: bool = False,
        deterministic: bool = False,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> Gradients:
        """Compute gradients in float64; see `adaattn_core.backend.Differentiates.backward`.

        `out` and `lse` are always computed again, and every call gives the same bits.
        """
        problem = AttentionProblem.from_arrays(
            query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks
        )
        return backward(problem, grad_out, grad_lse, need_bias)

    def provenance(self) -> dict[str, str]:
        """Return library versions, BLAS and threads."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "blas": f"{blas.get('name')} {blas.get('version')}",
            "threads": str(thread_count()),
        }


def _run_head(
    view: HeadView, head: HeadPlan, seed: int, probes: list[GroupProbe] | None
) -> tuple[HeadOutput, RunFacts]:
    structure = head.structure
    facts = _input_facts(view)
    rank = 0
    if isinstance(structure, LowRank) and view.visible:
        factors = score_factors(view.query, view.key[view.seen_keys], structure.rank)
        projected = np.zeros((view.len_kv, factors.key_r.shape[1]), view.key.dtype)
        projected[view.seen_keys] = factors.key_r
        query = factors.query_r.astype(view.query.dtype)
        view = replace(view, query=query, kv=KeyValues(projected, view.value))
        rank = factors.key_r.shape[1]
        left = float(mul_up(factors.score_residual_upper, view.scale))
        facts = replace(_input_facts(view), score_residual_upper=left)
    if view.softcap and isinstance(structure, Landmark):
        raise UnsupportedError(
            got="the landmark structure under a softcap",
            needed="a structure that computes every score it stands for",
            do="use dense, score_skip, low_rank or block_sparse for this head",
        )
    operands = prepare_operands(view, head, seed)
    output: HeadOutput | None
    if not view.visible:
        output = HeadOutput.empty(view, operands)
    elif isinstance(structure, ScoreSkip):
        output = score_skip(view, operands, structure)
    elif isinstance(structure, BlockSparse):
        blocks = key_blocks(view, structure, seed)
        output = block_sparse(view, operands, structure, blocks)
    elif isinstance(structure, Landmark):
        output = landmark(view, operands, structure, seed, probes)
        if output is None:
            raise UnsupportedError(
                got="the landmark structure under a window, boolean or additive mask",
                needed="a causal or full mask (key lengths and ragged batches included)",
                do="use block_sparse, score_skip or dense for this head",
            )
    elif isinstance(structure, Dense | LowRank):
        output = dense(view, operands)
    else:
        raise UnsupportedError(
            got=f"structure {structure.kind!r}",
            needed="dense, score_skip, low_rank, block_sparse or landmark",
            do="choose one of these",
        )
    for shift in (operands.lse_shift, view.lse_shift):
        if shift is not None:
            output.lse = np.where(output.lse == -np.inf, -np.inf, output.lse + shift)
    output.out[~view.live] = 0
    if not view.regular:  # scores that Inf makes -inf are seen, all the same; so is overflow
        lost = view.live & ~np.isfinite(output.lse)
        output.out[lost], output.lse[lost] = np.nan, np.nan
    if view.sink is not None:
        share, output.lse = with_sink(output.lse, view.sink)
        output.out = output.out * share[:, None].astype(output.out.dtype)
    return output, _with_run_facts(facts, view, operands, output, rank)


def _input_facts(view: HeadView) -> RunFacts:
    """Norms of the visible input vectors, as upper bounds; nothing rounded or left out."""
    bias_max = 0.0
    widest = int((view.stop - view.start).max(initial=0))
    if view.bias is not None:
        # The shift is known to float64's accuracy, whatever the scores are computed in.
        unit = float(np.finfo(view.query.dtype).eps)
        lost = view.scanned.shift_max_abs * (float(np.finfo(np.float64).eps) / unit)
        bias_max = (view.scanned.bias_max_abs + lost) * (1 + 1e-6)
    return RunFacts(
        query_norm_upper=view.query_norm_upper,
        key_norm_upper=float(view.seen(view.kv.key_norm).max(initial=0.0)),
        value_norm_upper=float(view.seen(view.kv.value_norm).max(initial=0.0)),
        query_residual_upper=0.0,
        key_residual_upper=0.0,
        value_residual_upper=0.0,
        value_diameter_upper=view.value_diameter_upper,
        score_residual_upper=0.0,
        dropped_mass_upper=0.0,
        bias_max_abs=bias_max,
        sink_abs=abs(view.sink) if view.sink is not None and math.isfinite(view.sink) else 0.0,
        keys_max=widest if view.seen_keys.any() else 0,
    )


def _with_run_facts(
    facts: RunFacts, view: HeadView, operands: Operands, output: HeadOutput, rank: int
) -> RunFacts:
    key_norm = facts.key_norm_upper
    if operands.lse_shift is not None or operands.score_shift is not None:
        # The keys as multiplied: smoothed.
        size = largest_norm_upper(operands.key[view.seen_keys])
        smoothed = float(add_up(size, operands.key_residual_upper))
        # Under a softcap the mean key, no longer than the longest, is multiplied as well.
        both = operands.score_shift is not None
        key_norm = float(add_up(smoothed, key_norm)) if both else smoothed
    return replace(
        facts,
        share=output.computed / view.visible if view.visible else 1.0,
        rank=rank or output.rank,
        key_norm_upper=key_norm,
        query_residual_upper=operands.query_residual_upper,
        key_residual_upper=operands.key_residual_upper,
        value_residual_upper=operands.value_residual_upper,
        query_step_upper=operands.query_step_upper,
        key_step_upper=operands.key_step_upper,
        dropped_mass_upper=output.dropped_mass_upper,
        arithmetic=output.arithmetic,
    )


def _with_page_facts(facts: RunFacts, problem: AttentionProblem, index: HeadIndex) -> RunFacts:
    """Speak of the keys and values that narrow pages were rounded from, not of their codes."""
    if problem.paged is None:
        return facts
    key, value = problem.paged.residuals(index[0], index[1] // problem.group_size)
    if key == value == 0.0:
        return facts
    return replace(
        facts,
        key_norm_upper=float(add_up(facts.key_norm_upper, key)),
        value_norm_upper=float(add_up(facts.value_norm_upper, value)),
        key_residual_upper=float(add_up(facts.key_residual_upper, key)),
        value_residual_upper=float(add_up(facts.value_residual_upper, value)),
        value_diameter_upper=float(add_up(facts.value_diameter_upper, mul_up(2.0, value))),
    )


def _with_output_facts(facts: RunFacts, out: NDArray[Any]) -> RunFacts:
    """Add what only the returned rows tell."""
    size = rms_norm_lower(out)
    finite = math.isfinite(size)
    return replace(facts, output_rms=size if finite else 0.0, nonfinite=not finite)


def _narrow(lse: Float) -> Float:
    """Log-sum-exps as float32; finite ones stay finite, since -inf means "sees nothing"."""
    largest = np.finfo(np.float32).max
    return np.where(np.isinf(lse), lse, np.clip(lse, -largest, largest)).astype(np.float32)


def _empty_result(problem: AttentionProblem) -> RawResult:
    shape = (problem.batch, problem.heads_q, problem.len_q)
    dtype = FORMATS[problem.dtype].dtype
    return RawResult(
        out=np.zeros((*shape, problem.dim_v), dtype),
        lse=np.full(shape, -np.inf, np.float32),
    )


def _most_scores(problem: AttentionProblem) -> int:
    """Visible scores of the problem's largest head."""
    return max((problem.visible_scores(s.index) for s in problem.sequences), default=0)


def _check_formats(head: HeadPlan) -> None:
    if not {head.qk, head.pv} <= set(FORMATS_RUN):
        raise UnsupportedError(
            got=f"qk={head.qk}, pv={head.pv}",
            needed=f"formats out of {', '.join(FORMATS_RUN)}",
            do="use e4m3 where e5m2 was meant",
        )
    if (head.qk == "f64") != (head.pv == "f64"):
        raise UnsupportedError(
            got=f"qk={head.qk}, pv={head.pv}",
            needed="f64 for both products or for none",
            do='use qk="f64", pv="f64"',
        )
