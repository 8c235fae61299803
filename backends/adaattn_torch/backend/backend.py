"""TorchBackend: measures heads, runs plans, and compares sampled rows with exact attention."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from adaattn_core.backend import ORACLE_SHARE, Capabilities
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RowErrors
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import MeasureRequest, ProblemStats
from adaattn_core.structure import Dense, Landmark, Structure
from adaattn_torch.backend import costing, halves, kernels
from adaattn_torch.backend.dense import attend, spelled_out
from adaattn_torch.backend.facts import facts_of
from adaattn_torch.backend.geometry import Geometry
from adaattn_torch.backend.landmark import (
    LandmarkOutput,
    landmark,
    landmark_tiles,
    refuse_mask,
)
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.measuring import measure_sequence
from adaattn_torch.backend.operands import Operands
from adaattn_torch.backend.probing import Prober
from adaattn_torch.backend.rows import row_errors
from adaattn_torch.backend.sequences import Sequence
from adaattn_torch.backend.short import forward
from adaattn_torch.backend.tensors import DTYPES, as_tensor
from adaattn_torch.backend.tiling import Tiling

FORMATS = ("f64", "f32", "f16", "bf16")
"""Operand formats that plans may name here."""
SIZES = Landmark(band=128, group=256, samples=8, tile=256, tail=64, screen_rank=0)
"""Landmarks as they are cheapest here."""


class Workspace:
    """A problem's sequences as tensors."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self._sequences: dict[int, Sequence] = {}

    def __getitem__(self, index: int) -> Sequence:
        if index not in self._sequences:
            self._sequences[index] = Sequence(self.problem, index)
        return self._sequences[index]


class TorchBackend:
    """Dense and landmark plans in PyTorch's own operations, on any device that it knows."""

    name = "torch"

    def __init__(self) -> None:
        self._last = threading.local()

    def capabilities(self) -> Capabilities:
        """Dense and landmarks, in the formats that PyTorch multiplies."""
        return Capabilities(
            qk_formats=FORMATS,
            pv_formats=FORMATS,
            structures=("dense", "landmark"),
            sizes=(SIZES,),
            array_devices=_devices(),
            target=costing.TARGET,
            costs=costing.prices(),
        )

    def measure(
        self, problem: AttentionProblem, request: MeasureRequest
    ) -> tuple[ProblemStats, Workspace]:
        """Measure every head; see `adaattn_core.backend.Measures.measure`."""
        _check_problem(problem)
        space, heads = Workspace(problem), {}
        with torch.inference_mode():
            for span in problem.sequences:
                found = measure_sequence(space[span.index], request)
                heads.update({(span.index, head): said for head, said in found.items()})
        return ProblemStats(heads), space

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Run the plan; see `adaattn_core.backend.Backend.run`.

        Raises
        ------
        UnsupportedError
            If a format or structure is not one of `capabilities`, only one of the two products
            is asked for in f64, or landmarks meet a mask that is neither causal nor full.
        """
        _check_problem(problem)
        plan.check_fits(problem)
        todo = list(problem.heads() if heads is None else heads)
        for index in todo:
            _check(plan[index])
        space = workspace
        if not isinstance(space, Workspace) or space.problem is not problem:
            space = Workspace(problem)
        raw = _empty_result(problem, whole=heads is None) if into is None else into
        raw.workspace = space
        used: set[str] = set()
        by_sequence: dict[int, list[int]] = {}
        for sequence, head in todo:
            by_sequence.setdefault(sequence, []).append(head)
        with torch.inference_mode():
            for number, chosen in by_sequence.items():
                used |= _run_sequence(space, number, chosen, plan, raw)
        self._last.kernels = sorted(used)
        return raw

    def row_errors(
        self,
        problem: AttentionProblem,
        raw: RawResult,
        rows: Mapping[HeadIndex, NDArray[Any]],
        *,
        enough: float = 0.0,
    ) -> dict[HeadIndex, RowErrors]:
        """Compare returned rows with exact ones; see `adaattn_core.backend.Samples`."""
        space = raw.workspace
        if not isinstance(space, Workspace) or space.problem is not problem:
            space = Workspace(problem)
        found: dict[HeadIndex, RowErrors] = {}
        with torch.inference_mode():
            for sequence in {sequence for sequence, _ in rows}:
                mine = {
                    head: chosen for (owner, head), chosen in rows.items() if owner == sequence
                }
                little = {
                    head: ORACLE_SHARE * enough * raw.facts[sequence, head].output_rms
                    for head in mine
                }
                errors = row_errors(space[sequence], mine, raw.out, raw.lse, little)
                found.update({(sequence, head): error for head, error in errors.items()})
        return found

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
    ) -> tuple[Any, Any]:
        """Exact attention by the shortest way; see `adaattn_core.backend.Forwards.forward`."""
        return forward(self, query, key, value, mask, scale)

    def provenance(self) -> dict[str, str]:
        """Return PyTorch's version, its threads, and the kernels of this thread's last run."""
        return {
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
            "kernels": "; ".join(getattr(self._last, "kernels", ())),
        }


def _devices() -> tuple[str, ...]:
    """Kinds of devices that this PyTorch computes on."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    for name in ("mps", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and getattr(module, "is_available", bool)():
            found.append(name)
    return tuple(found)


def _check_problem(problem: AttentionProblem) -> None:
    if problem.paged is None and problem.softcap is None and problem.sinks is None:
        return
    what = "pages" if problem.paged is not None else "a softcap or sinks"
    raise UnsupportedError(
        got=f"{what} on backend torch",
        needed="arrays of keys and values, plain scores",
        do='use backend="numpy"',
    )


def _check(head: HeadPlan) -> None:
    if not {head.qk, head.pv} <= set(FORMATS):
        raise UnsupportedError(
            got=f"qk={head.qk}, pv={head.pv}",
            needed=f"formats out of {', '.join(FORMATS)}, which PyTorch multiplies",
            do='use backend="numpy", which emulates the others',
        )
    if (head.qk == "f64") != (head.pv == "f64"):
        raise UnsupportedError(
            got=f"qk={head.qk}, pv={head.pv}",
            needed="f64 for both products or for none",
            do='use qk="f64", pv="f64"',
        )
    if not isinstance(head.structure, Dense | Landmark):
        raise UnsupportedError(
            got=f"structure {head.structure.kind!r}",
            needed="dense or landmark",
            do='use one of these, or backend="numpy"',
            structure=head.structure.kind,
        )


def _empty_result(problem: AttentionProblem, *, whole: bool) -> RawResult:
    """Room for the output; nothing in it where sequences that all run leave no row out."""
    query = as_tensor(problem.query)
    shape = (problem.batch, problem.heads_q, problem.len_q)
    out = query.new_empty((*shape, problem.dim_v), dtype=DTYPES[problem.dtype])
    lse = query.new_empty(shape, dtype=torch.float32)
    if (
        not whole
        or sum(span.len_q for span in problem.sequences) < problem.batch * problem.len_q
    ):
        out.zero_()
        lse.fill_(-torch.inf)
    return RawResult(out, lse)


def _run_sequence(
    space: Workspace, number: int, heads: list[int], plan: Plan, raw: RawResult
) -> set[str]:
    """Run some heads of a sequence, those with equal plans together."""
    sequence = space[number]
    regular = sequence.regular
    groups: dict[tuple[Structure, str, str, bool], list[int]] = {}
    for head in range(space.problem.heads_q):
        how = plan[number, head]
        structure = how.structure
        sound = regular[head] and (how.qk == "f64" or sequence.fits_float32)
        if not sound and structure != Dense():
            if head in heads:
                raw.ran_dense.add((number, head))
            structure = Dense()
        if isinstance(structure, Landmark):  # heads that differ in their mass go together
            structure = replace(structure, tau=0.0)
        groups.setdefault((structure, how.qk, how.pv, sound), []).append(head)
    used: set[str] = set()
    for (structure, qk, pv, sound), planned in groups.items():
        chosen = [head for head in planned if head in heads]
        if not chosen:
            continue
        said: dict[str, Any] = {}
        if isinstance(structure, Landmark) and sequence.mask.visible:
            taus = [plan[number, head].structure.tau for head in chosen]  # type: ignore[attr-defined]
            found = _landmarks(sequence, chosen, structure, (qk, pv), taus, plan.seed)
            out, lse = found.out, found.lse
            names = {kernels.kernel_for(out, out.shape[2], masked=True)}
            said = {"share": found.share, "rank": found.rank, "dropped": found.dropped}
        else:
            out, lse, names = _dense(sequence, planned, chosen, (qk, pv), sound)
        used |= names
        stored = out.to(raw.out.dtype)
        _write(raw, sequence, chosen, stored, lse)
        arithmetic = kernels.arithmetic_of(names, sequence.query.shape[2], sequence.mask.len_kv)
        if said:  # its fields are merged: more steps than one kernel takes
            arithmetic = replace(arithmetic, step_keys=0)
        facts = facts_of(sequence, chosen, (qk, pv), stored, arithmetic, **said)
        raw.facts.update({(number, head): known for head, known in facts.items()})
    return used


def _write(
    raw: RawResult,
    sequence: Sequence,
    heads: list[int],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Put heads' rows into the result."""
    span, mask = sequence.span, sequence.mask
    rows = slice(span.q_start, span.q_stop)
    index = torch.tensor(heads, device=raw.out.device)
    if mask.bias is not None:
        shift = mask.known.shift
        lse = lse.double() + (shift if len(shift) == 1 else shift[index])
    raw.out[span.batch, index, rows] = out
    raw.lse[span.batch, index, rows] = narrow(lse)


def _landmarks(
    sequence: Sequence,
    heads: list[int],
    structure: Landmark,
    formats: tuple[str, str],
    taus: list[float],
    seed: int,
) -> LandmarkOutput:
    """Run heads under one landmark structure but for its mass."""
    geometry = Geometry.of(sequence.mask, structure)
    if geometry is None:
        raise refuse_mask()
    dtype = sequence.working(*formats)
    dtype = dtype if dtype == torch.float64 else torch.float32
    operands, tiling = sequence.formatted(*formats).to(dtype), Tiling.of(geometry)
    if tiling is not None:
        return landmark_tiles(operands, heads, tiling, sequence.mask, taus, seed)
    return landmark(Prober(operands.heads(heads), heads, geometry, seed), sequence.mask, taus)


def _dense(
    sequence: Sequence,
    planned: list[int],
    heads: list[int],
    formats: tuple[str, str],
    sound: bool,
) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """Attend some of the heads that a plan runs like this; bits depend on the plan alone."""
    every = list(range(len(sequence.query)))
    if heads != every and sequence.query.device.type != "cpu":
        # Products of other shapes may differ in bits there: heads are computed as ever.
        out, lse, names = _dense(sequence, every, every, formats, sound)
        return out[heads], lse[heads], names
    operands = sequence.formatted(*formats) if sound else sequence.careful(*formats)
    if heads == every:
        return _attended(operands, sequence.mask, sound)
    outs, sums, used = [], [], set()
    for members, whole in _calls(operands, planned, heads):  # keys are not copied
        mask = sequence.mask.heads(members)
        out, lse, names = _attended(operands.together(members), mask, sound, whole)
        outs.append(out)
        sums.append(lse)
        used |= names
    return torch.cat(outs), torch.cat(sums), used


def _calls(
    operands: Operands, planned: list[int], heads: list[int]
) -> Iterator[tuple[list[int], int]]:
    """Heads that are attended together, and how many of their key/value heads are not halved.

    Where a call of the plan is made for some of its heads only, each goes the same way.
    """
    query = operands.query
    for run in operands.sharing(planned):
        shape = (len(run), len(run[0]), query.shape[1])
        whole = halves.whole_part(shape, query.dtype, query.device.type)
        together = [head for members in run for head in members]
        if set(together) <= set(heads):
            yield together, whole
            continue
        for n, members in enumerate(run):
            some = [head for head in members if head in heads]
            if some:
                yield some, int(n < whole)


def _attended(
    operands: Operands, mask: SequenceMask, sound: bool, whole: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    if sound:
        return attend(operands, mask, whole=whole)
    out, lse = spelled_out(operands, mask, careful=True)
    return out, lse, {kernels.PLAIN}


def narrow(lse: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps as float32; finite ones stay finite, since -inf means "sees nothing"."""
    if lse.dtype == torch.float32:
        return lse
    largest = torch.finfo(torch.float32).max
    return torch.where(torch.isinf(lse), lse, lse.clamp(-largest, largest)).float()
