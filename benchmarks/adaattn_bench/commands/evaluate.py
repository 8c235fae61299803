"""``adaattn eval``: what a budget does to a model, and what each adaptive part is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from adaattn_bench import eval_figures
from adaattn_bench.commands.options import Steps, numbers, wholes
from adaattn_bench.commands.outputs import Outputs, tell
from adaattn_bench.devices import checked_device
from adaattn_bench.eval_tables import sheets
from adaattn_bench.evaluation import OF_HEADS, PARTS, Settings, evaluate
from adaattn_core.costs import get_cost_model
from adaattn_core.errors import ArgumentError
from adaattn_core.report.tables import console

Option = typer.Option


def register(group: typer.Typer) -> None:
    """Add the command."""
    group.command("eval")(evaluation)


def evaluation(
    model: Annotated[
        str, Option(help="smollm2, a .gguf file, or a folder that transformers wrote")
    ] = "smollm2",
    device: Annotated[str, Option(help="of the model: auto, cpu or cuda")] = "auto",
    text: Annotated[
        list[str] | None,
        Option(help="prose, code or a file; may be repeated [default: prose, code]"),
    ] = None,
    budgets: Annotated[
        str, Option(help="error budgets, by commas; heads and ablations use the first")
    ] = "0.1,0.2",
    parts: Annotated[str, Option(help=f"some of {', '.join(PARTS)}, or all")] = "all",
    tokens: Annotated[int, Option(min=2, help="tokens of a perplexity window")] = 1024,
    windows: Annotated[int, Option(min=1, help="windows of each text")] = 2,
    lengths: Annotated[str, Option(help="tokens around a needle")] = "1024,2048",
    depths: Annotated[str, Option(help="where the needle stands, as shares")] = "0.2,0.5,0.8",
    prompt_tokens: Annotated[int, Option(min=1, help="before greedy text")] = 1024,
    greedy_tokens: Annotated[int, Option(min=1, help="of greedy text")] = 32,
    questions: Annotated[int, Option(min=1, help="multiple-choice questions")] = 20,
    context_tokens: Annotated[int, Option(min=1, help="before the gap of a question")] = 512,
    heads: Annotated[
        str, Option(help="model, or demo: the shipped heads, which need no model")
    ] = "model",
    head_tokens: Annotated[int, Option(min=2, help="tokens of single heads")] = 1024,
    ablation_layers: Annotated[int, Option(min=1, help="layers that are ablated")] = 6,
    target: Annotated[str, Option(help="machine that ablated plans are for")] = "sm90",
    hurried: Annotated[
        bool, Option("--hurried", help="let plans pay for measuring and certifying")
    ] = False,
    seconds: Annotated[float, Option(min=0, help="begin nothing later")] = 3600.0,
    seed: Annotated[int, Option(min=0, help="of questions and ablations")] = 0,
    out: Annotated[
        Path | None, Option(help="folder for eval.json, eval.md and eval.png")
    ] = None,
    stem: Annotated[str, Option(help="name of the files in that folder")] = "eval",
    report: Annotated[Path | None, Option(help="write a self-contained HTML page")] = None,
    as_json: Annotated[bool, Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Evaluate a model, its heads and the policy's parts within budgets."""
    settings = Settings(
        model=model,
        device=checked_device(device),
        texts=tuple(text or ("prose", "code")),
        budgets=numbers("--budgets", budgets),
        parts=_parts(parts),
        tokens=tokens,
        windows=windows,
        lengths=wholes("--lengths", lengths),
        depths=_depths(depths),
        prompt_tokens=prompt_tokens,
        greedy_tokens=greedy_tokens,
        questions=questions,
        context_tokens=context_tokens,
        heads=_heads(heads),
        head_tokens=head_tokens,
        ablation_layers=ablation_layers,
        target=get_cost_model(target).name,
        hurried=hurried,
        seconds=seconds,
        seed=seed,
    )
    outputs = Outputs.checked(out, stem, report)
    with Steps("eval", settings.steps) as steps:
        found = evaluate(settings, steps.note)
    outputs.write(found, eval_figures)
    tell(found, as_json, _show)


def _parts(text: str) -> tuple[str, ...]:
    names = PARTS if text == "all" else tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ArgumentError(
            got=f"--parts {text}",
            needed=f"all, or some of {', '.join(PARTS)}",
            do="separate them by commas",
        )
    return tuple(part for part in PARTS if part in names)


def _depths(text: str) -> tuple[float, ...]:
    found = numbers("--depths", text.replace("0.0", "0")) if text != "0" else (0.0,)
    if max(found) > 1:
        raise ArgumentError(
            got=f"--depths {text}", needed="shares up to 1", do="e.g. --depths 0.2,0.5,0.8"
        )
    return found


def _heads(text: str) -> str:
    if text not in ("model", "demo"):
        raise ArgumentError(
            got=f"--heads {text}",
            needed="model, or demo",
            do=f"use demo with --parts {','.join(OF_HEADS)} to need no model",
        )
    return text


def _show(found: dict[str, Any]) -> None:
    screen = console()
    for sheet in sheets(found):
        table = Table(
            title=sheet.title, title_justify="left", box=None, pad_edge=False,
            header_style="bold", caption=sheet.remark, caption_justify="left",
        )  # fmt: skip
        for number, name in enumerate(sheet.header):
            table.add_column(name, justify="right" if number else "left")
        for row in sheet.rows:
            table.add_row(*row)
        screen.print(table)
        screen.print()
    for text in found["cut_short"]:
        screen.print(f"not evaluated: {text}")
