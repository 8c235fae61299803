"""``adaattn backends``: what is installed, what can run here, and what is broken."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from adaattn_core.backend import Capabilities, Differentiates, Forwards, Measures, Samples
from adaattn_core.deciding import Decides
from adaattn_core.errors import AdaAttnError
from adaattn_core.plugins.registry import BackendInfo, get_backend, list_backends
from adaattn_core.report.tables import console, print_json

PROTOCOLS: dict[str, type] = {
    "samples": Samples,
    "measures": Measures,
    "forwards": Forwards,
    "differentiates": Differentiates,
    "decides": Decides,
}


def backends(
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON instead of a table")
    ] = False,
) -> None:
    """List backends, and plugins that failed to load."""
    found = [_describe(info) for info in list_backends()]
    if as_json:
        print_json({"backends": found})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("backend", "plugin", "here", "formats (QK | PV)", "structures", "note"):
        table.add_column(column)
    for row in found:
        facts = row["capabilities"]
        formats = structures = "-"
        if facts:
            formats = f"{' '.join(facts['qk_formats'])} | {' '.join(facts['pv_formats'])}"
            structures = " ".join(facts["structures"])
        table.add_row(
            row["name"] or "-",
            row["plugin"],
            "yes" if row["available"] else "no",
            formats,
            structures,
            row["reason"],
        )
    console().print(table)


def _describe(info: BackendInfo) -> dict[str, Any]:
    """Ask an available backend what it can do; one that breaks on loading is not available."""
    body: dict[str, Any] = dataclasses.asdict(info) | {"capabilities": None}
    if info.available:
        try:
            backend = get_backend(info.name)
            capabilities: Capabilities = backend.capabilities()
        except AdaAttnError as error:
            return body | {"available": False, "reason": error.got}
        measured = {kind: model.source for kind, model in capabilities.costs.items()}
        body["capabilities"] = (
            dataclasses.asdict(capabilities)
            | {"costs": measured}
            | {name: isinstance(backend, protocol) for name, protocol in PROTOCOLS.items()}
        )
    return body
