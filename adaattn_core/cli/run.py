"""``adaattn run``: attention of a Q/K/V file to a stated tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adaattn_core.arrays import to_numpy
from adaattn_core.cli.compute import Outcome, compute
from adaattn_core.cli.inputs import Inputs, read_inputs
from adaattn_core.cli.options import parse_budget, parse_mask
from adaattn_core.cli.outputs import check_array_output, check_writable, write_output
from adaattn_core.cli.report import render_report
from adaattn_core.cli.tables import console, head_table, print_json, progress, total_lines
from adaattn_core.files import atomic_write_text
from adaattn_core.plan import Plan

Optional = typer.Option


def run(
    file: Annotated[Path, typer.Argument(help="q, k, v as .npz or .safetensors")],
    budget: Annotated[
        str, Optional(help="tolerated row error relative to the rms output row, or 'exact'")
    ] = "0.1",
    rows: Annotated[
        float | None, Optional(help="share of rows that must keep the budget [default: 0.95]")
    ] = None,
    confidence: Annotated[
        float | None, Optional(help="confidence of the statement [default: 0.95]")
    ] = None,
    guarantee: Annotated[
        str | None,
        Optional(help="sampled, probabilistic or worst_case [default: sampled]"),
    ] = None,
    on_violation: Annotated[
        str | None, Optional(help="escalate, raise or report [default: escalate]")
    ] = None,
    policy: Annotated[str | None, Optional(help="policy by name [default: budget]")] = None,
    target: Annotated[
        str | None, Optional(help="machine to plan for, e.g. sm90 [default: the backend's own]")
    ] = None,
    backend: Annotated[str, Optional(help="backend by name")] = "auto",
    causal: Annotated[bool, Optional("--causal/--full", help="which keys a row sees")] = True,
    alignment: Annotated[
        str | None, Optional(help="top_left or bottom_right, where the lengths differ")
    ] = None,
    scale: Annotated[
        float | None,
        Optional(help="factor on scores [default: the file's, or 1/sqrt(dim)]"),
    ] = None,
    measure: Annotated[
        bool, Optional("--measure", help="also compute the true error and the dense time")
    ] = False,
    plan: Annotated[
        Path | None, Optional(help="run this saved plan and decide nothing")
    ] = None,
    save_plan: Annotated[Path | None, Optional(help="write the plan that ran")] = None,
    out: Annotated[
        Path | None, Optional(help="write out and lse to this .npz or .safetensors")
    ] = None,
    report: Annotated[Path | None, Optional(help="write a self-contained HTML page")] = None,
    seed: Annotated[int | None, Optional(help="seed of every random choice")] = None,
    as_json: Annotated[bool, Optional("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Compute the attention of a file to a tolerance; print the plan and the certificates."""
    error_budget = parse_budget(
        budget, rows=rows, confidence=confidence, guarantee=guarantee, on_violation=on_violation
    )
    mask = parse_mask(causal, alignment)
    for path in (save_plan, report):
        if path is not None:
            check_writable(path)
    if out is not None:
        check_array_output(out)
    inputs = read_inputs(file)
    if scale is not None:
        inputs = Inputs(inputs.query, inputs.key, inputs.value, scale, inputs.batched)
    with progress() as bar:
        task = bar.add_task("attention and truth" if measure else "attention", total=1)
        outcome = compute(
            inputs,
            mask=mask,
            measure=measure,
            layer=file.stem,
            budget=error_budget,
            policy=policy,
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
    if report is not None:
        provenance = outcome.result.provenance
        page = render_report(file.name, outcome.rows, outcome.totals, settings, provenance)
        atomic_write_text(report, page)
    _show(outcome, settings, as_json=as_json)


def _in_file_axes(inputs: Inputs, outcome: Outcome) -> tuple[Any, Any]:
    arrays = to_numpy(outcome.result.out), to_numpy(outcome.result.lse)
    return arrays if inputs.batched else (arrays[0][0], arrays[1][0])


def _show(outcome: Outcome, settings: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "heads": [row.to_json() for row in outcome.rows],
                "totals": outcome.totals.to_json(),
                "settings": settings,
                "provenance": dict(outcome.result.provenance),
            }
        )
        return
    screen = console()
    title = f"{settings['file']}: {settings['mask']} mask, budget {settings['budget']}"
    screen.print(head_table(outcome.rows, title))
    for line in total_lines(outcome.totals):
        screen.print(line)
