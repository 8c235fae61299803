"""``adaattn warmup``: what first calls would wait for, and what plans would like to know."""

from __future__ import annotations

from typing import Annotated

import typer

from adaattn_core.plugins.registry import default_registry


def warmup(
    arch: Annotated[
        str | None,
        typer.Option(help="compile kernels for it, e.g. sm_90a; default: for what is here"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="compilers to run at a time")] = 2,
) -> None:
    """Compile the usual kernels and measure prices now, so that no first call has to."""
    default_registry().warm_up(typer.echo, arch, jobs)
