"""``adaattn run``: attention of a Q/K/V file to a stated tolerance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adaattn_core.arrays import to_numpy
from adaattn_core.cli.compute import Outcome, compute
from adaattn_core.cli.inputs import Inputs, read_inputs
from adaattn_core.cli.options import parse_budget, parse_mask, parse_policy
from adaattn_core.cli.outputs import check_array_output, check_writable_apart, write_output
from adaattn_core.errors import ArgumentError
from adaattn_core.files import atomic_write_text
from adaattn_core.plan import Plan
from adaattn_core.report.diff import read_run
from adaattn_core.report.run_page import render_report
from adaattn_core.report.tables import console, head_table, print_json, progress, total_lines

Option = typer.Option


def run(
    file: Annotated[
        Path, typer.Argument(help="q, k, v (scale, mask) as .npz, .safetensors or .npy")
    ],
    budget: Annotated[
        str, Option(help="tolerated row error relative to the rms output row, or 'exact'")
    ] = "0.1",
    rows: Annotated[
        float | None, Option(help="share of rows that must keep the budget [default: 0.95]")
    ] = None,
    confidence: Annotated[
        float | None, Option(help="confidence of the statement [default: 0.95]")
    ] = None,
    guarantee: Annotated[
        str | None,
        Option(help="sampled, probabilistic or worst_case [default: sampled]"),
    ] = None,
    on_violation: Annotated[
        str | None, Option(help="escalate, raise or report [default: escalate]")
    ] = None,
    policy: Annotated[str | None, Option(help="policy by name [default: budget]")] = None,
    structure: Annotated[
        str | None, Option(help="for --policy fixed: kind, or kind:field=value,field=value")
    ] = None,
    qk: Annotated[str | None, Option(help="for --policy fixed: format of the scores")] = None,
    pv: Annotated[str | None, Option(help="for --policy fixed: format of P·V")] = None,
    calibration: Annotated[
        Path | None, Option(help="for --policy calibrated: plan file, or folder of them")
    ] = None,
    target: Annotated[
        str | None, Option(help="machine to plan for, e.g. sm90 [default: the backend's own]")
    ] = None,
    backend: Annotated[str, Option(help="backend by name")] = "auto",
    causal: Annotated[
        bool,
        Option("--causal/--full", help="which keys a row sees, of those in the file's mask"),
    ] = True,
    alignment: Annotated[
        str | None, Option(help="top_left or bottom_right, where the lengths differ")
    ] = None,
    scale: Annotated[
        float | None,
        Option(help="factor on scores [default: the file's, or 1/sqrt(dim)]"),
    ] = None,
    measure: Annotated[
        bool, Option("--measure", help="also compute the true error and the dense time")
    ] = False,
    plan: Annotated[Path | None, Option(help="run this saved plan and decide nothing")] = None,
    save_plan: Annotated[Path | None, Option(help="write the plan that ran")] = None,
    out: Annotated[
        Path | None, Option(help="write out and lse to this .npz or .safetensors")
    ] = None,
    report: Annotated[Path | None, Option(help="write a self-contained HTML page")] = None,
    compare: Annotated[
        Path | None,
        Option(help="with --report: JSON or page of an earlier run, to show what changed"),
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="seed of every random choice")] = None,
    as_json: Annotated[bool, Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compute attention of a file of q, k, v to a tolerance."""
    error_budget = parse_budget(
        budget, rows=rows, confidence=confidence, guarantee=guarantee, on_violation=on_violation
    )
    mask = parse_mask(causal, alignment)
    deciding = parse_policy(policy, structure=structure, qk=qk, pv=pv, calibration=calibration)
    if out is not None:
        check_array_output(out)
    check_writable_apart(file, *(path for path in (out, save_plan, report) if path is not None))
    before = None if compare is None else (str(compare), _read_earlier(compare, report))
    inputs = read_inputs(file)
    mask = mask & inputs.mask
    if scale is not None:
        inputs = replace(inputs, scale=scale)
    with progress() as bar:
        task = bar.add_task("attention and truth" if measure else "attention", total=1)
        outcome = compute(
            inputs,
            mask=mask,
            measure=measure,
            layer=file.stem,
            budget=error_budget,
            policy=deciding,
            plan=None if plan is None else Plan.load(plan),
            backend=backend,
            target=target,
            seed=seed,
        )
        bar.advance(task)
    settings: dict[str, Any] = {
        "file": str(file),
        "query": list(inputs.query.shape),
        "key": list(inputs.key.shape),
        "dtype": inputs.query.dtype.name,
        "mask": mask.describe(),
        "budget": "exact" if error_budget is None else str(error_budget),
    }
    if out is not None:
        write_output(out, *_in_file_axes(inputs, outcome))
    if save_plan is not None:
        outcome.result.plan.save(save_plan)
    body = _document(outcome, settings)
    if report is not None:
        rel = None if error_budget is None else error_budget.rel
        page = render_report(file.name, body, budget=rel, before=before)
        atomic_write_text(report, page)
    if as_json:
        print_json(body)
    else:
        _show(outcome, settings)


def _in_file_axes(inputs: Inputs, outcome: Outcome) -> tuple[Any, Any]:
    arrays = to_numpy(outcome.result.out), to_numpy(outcome.result.lse)
    return arrays if inputs.batched else (arrays[0][0], arrays[1][0])


def _read_earlier(compare: Path, report: Path | None) -> dict[str, Any]:
    if report is None:
        raise ArgumentError(
            got=f"--compare {compare} without --report",
            needed="a page that shows the comparison",
            do="add --report out.html",
        )
    return read_run(compare)


def _document(outcome: Outcome, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "heads": [row.to_json() for row in outcome.rows],
        "totals": outcome.totals.to_json(),
        "settings": settings,
        "provenance": dict(outcome.result.provenance),
    }


def _show(outcome: Outcome, settings: dict[str, Any]) -> None:
    screen = console()
    title = f"{settings['file']}: {settings['mask']} mask, budget {settings['budget']}"
    screen.print(head_table(outcome.rows, title))
    for line in total_lines(outcome.totals):
        screen.print(line)
