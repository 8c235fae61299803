"""``adaattn explain``: read a saved plan aloud."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaattn_core.plan import Plan
from adaattn_core.report.tables import console, print_json


def explain(
    planfile: Annotated[Path, typer.Argument(help="written by --save-plan or Plan.save")],
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON instead of a table")
    ] = False,
) -> None:
    """Print a saved plan: which heads run how, and why."""
    plan = Plan.load(planfile)
    if as_json:
        print_json(plan.to_json())
    else:
        console().print(plan.explain(), soft_wrap=True)
