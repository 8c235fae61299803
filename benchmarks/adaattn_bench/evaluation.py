"""``adaattn eval``: what budgets do to a whole model, and what each adaptive part is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from adaattn_bench import tasks, texts
from adaattn_bench.ablations import Layer, ablate, summarise
from adaattn_bench.bench import Note
from adaattn_bench.clock import kept_when_interrupted
from adaattn_bench.devices import describe
from adaattn_bench.models import EXACT, TORCH, Model, Setting, load, settings
from adaattn_bench.policies import PARTS as ADAPTIVE_PARTS
from adaattn_bench.policies import unhurried
from adaattn_bench.problems import demo_inputs
from adaattn_bench.statistics import rounded
from adaattn_core.budget import ErrorBudget
from adaattn_core.report.summary import HeadRow

PARTS = ("perplexity", "needle", "greedy", "choices", "heads", "ablations")
OF_HEADS = ("heads", "ablations")
"""Parts that look at single heads; the shipped ones need no model."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is evaluated.

    Attributes
    ----------
    model : str
        `adaattn_bench.models.load`; not loaded where only shipped heads are looked at.
    device : str
        Of the model. Single heads are looked at on the host.
    texts : tuple of str
        Names or files; the first is also that of needles and greedy text.
    budgets : tuple of float
        The first is that of heads and ablations.
    parts : tuple of str
    tokens, windows : int
        Length and number of perplexity's windows.
    lengths, depths : tuple
        Of needles.
    prompt_tokens, greedy_tokens : int
    questions, context_tokens : int
        Number of multiple-choice questions, and tokens before the gap.
    heads : {"model", "demo"}
    head_tokens, ablation_layers : int
        Tokens of the captured heads; layers that are ablated, evenly spread.
    target : str
        Machine that ablated plans are for.
    hurried : bool
        Whether plans pay for measuring and certifying.
    seconds : float
        Begin nothing later.
    seed : int
    """

    model: str
    device: str
    texts: tuple[str, ...]
    budgets: tuple[float, ...]
    parts: tuple[str, ...]
    tokens: int
    windows: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    prompt_tokens: int
    greedy_tokens: int
    questions: int
    context_tokens: int
    heads: str
    head_tokens: int
    ablation_layers: int
    target: str
    hurried: bool
    seconds: float
    seed: int

    @property
    def needs_model(self) -> bool:
        """Whether anything asked for runs the model."""
        return self.heads == "model" or bool(set(self.parts) - set(OF_HEADS))

    @property
    def columns(self) -> list[Setting]:
        """Ways to compute attention, PyTorch's own first."""
        return settings(self.budgets, hurried=self.hurried)

    @property
    def steps(self) -> int:
        """How many times `evaluate` will say that something is done."""
        columns = len(self.columns)
        counts = {
            "perplexity": columns * len(self.texts),
            "needle": columns * len(self.lengths) * len(self.depths),
            "greedy": columns,
            "choices": columns * self.questions,
            "heads": 1,
            "ablations": 1 + len(ADAPTIVE_PARTS),
        }
        return sum(counts[part] for part in self.parts)


def evaluate(asked: Settings, note: Note = lambda _: None) -> dict[str, Any]:
    """Evaluate; Ctrl-C, or the time that was given, ends it early with what there is.

    Returns
    -------
    dict
        ``perplexity`` (by text and column), ``needle``, ``greedy``, ``choices`` (by column),
        ``heads`` (rows as of ``adaattn run --json``), ``totals``, ``ablations``, ``machine``,
        ``settings``, ``cut_short`` and ``interrupted``.
    """
    report: dict[str, Any] = {
        "kind": "eval",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(asked.device),
        "settings": asdict(asked),
        "cut_short": [],
    }
    run = _Run(asked, report, note, time.monotonic() + asked.seconds)
    with kept_when_interrupted(report):
        if asked.needs_model:
            note("loading the model")
            run.model = load(asked.model, asked.device)
        for part in asked.parts:
            run.part(part)
    if report["interrupted"]:
        report["cut_short"].append(f"{run.now}: interrupted")
    kept: dict[str, Any] = rounded(report)
    return kept


class _Run:
    """One evaluation as it goes on: what is known is in the report at any time."""

    def __init__(
        self, asked: Settings, report: dict[str, Any], note: Note, deadline: float
    ) -> None:
        self.asked, self.report, self.note, self.deadline = asked, report, note, deadline
        self.model: Any = None
        self.now = "the model"
        self._layers: list[Layer] | None = None

    def part(self, name: str) -> None:
        steps: dict[str, Callable[[], Iterator[str]]] = {
            "perplexity": self._perplexity,
            "needle": self._needle,
            "greedy": self._greedy,
            "choices": self._choices,
            "heads": self._heads,
            "ablations": self._ablations,
        }
        self.now = name
        going = steps[name]()
        while True:
            if time.monotonic() > self.deadline:
                self.report["cut_short"].append(f"{name}: no time left")
                return
            what = next(going, None)
            if what is None:
                return
            self.note(f"{name}: {what}")
            self.note("")

    def _table(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.report.setdefault(name, {})
        return found

    def _perplexity(self) -> Iterator[str]:
        asked, model = self.asked, self.model
        for name in asked.texts:
            ids = model.encode(texts.read_text(name), asked.tokens * asked.windows)
            windows = ids.split(asked.tokens)
            for column in asked.columns:
                row = tasks.perplexity(model, column, windows)
                self._table("perplexity").setdefault(name, {})[column.name] = row
                yield f"{name}, {column.name}"

    def _needle(self) -> Iterator[str]:
        asked, model = self.asked, self.model
        prose = model.encode(texts.read_text(asked.texts[0]), max(asked.lengths))
        for column in asked.columns:
            for length in asked.lengths:
                for depth in asked.depths:
                    row = tasks.needle(model, column, prose, length, depth)
                    self._table("needle").setdefault(column.name, []).append(row)
                    yield f"{column.name}, {length} tokens, depth {depth:g}"

    def _greedy(self) -> Iterator[str]:
        asked, model = self.asked, self.model
        ids = model.encode(texts.read_text(asked.texts[0]), asked.prompt_tokens)
        reference: list[int] = []
        for column in asked.columns:  # PyTorch's own is the first
            row = tasks.greedy(model, column, ids, asked.greedy_tokens, reference)
            reference = reference or row["tokens"]
            self._table("greedy")[column.name] = row
            yield column.name

    def _choices(self) -> Iterator[str]:
        asked, model = self.asked, self.model
        characters = 8 * asked.context_tokens
        given = texts.questions(asked.questions, context_characters=characters, seed=asked.seed)
        for column in asked.columns:
            for row in tasks.choices(model, column, given, asked.context_tokens):
                self._table("choices")[column.name] = row
                yield f"{column.name}, question {row['asked']}"

    def layers(self) -> list[Layer]:
        """Heads to look at, with their truth; captured once."""
        if self._layers is None:
            asked = self.asked
            if asked.heads == "demo":
                found = [
                    (name, i.query, i.key, i.value, i.scale)
                    for name, i in demo_inputs(asked.head_tokens)
                ]
            else:
                model: Model = self.model
                text = texts.read_text(asked.texts[0])
                found = list(model.heads(model.encode(text, asked.head_tokens)))
            self._layers = [Layer.of(*one) for one in found]
        return self._layers

    def _heads(self) -> Iterator[str]:
        asked, rel = self.asked, self.asked.budgets[0]
        policy = None if asked.hurried else unhurried()
        rows: list[HeadRow] = []
        started = time.perf_counter()
        seconds = 0.0
        for layer in self.layers():
            started = time.perf_counter()
            result = layer.run(ErrorBudget(rel=rel), policy, target=None, seed=None)
            seconds += time.perf_counter() - started
            rows += layer.rows(result)
            self.report["heads"] = [row.to_json() for row in rows]
            self.report["totals"] = summarise(rows, rel) | {"seconds": seconds}
        yield f"{len(rows)} heads"

    def _ablations(self) -> Iterator[str]:
        asked, layers = self.asked, self.layers()
        step = max(len(layers) // asked.ablation_layers, 1)
        some = layers[::step][: asked.ablation_layers]
        found = self.report.setdefault("ablations", [])
        self.report["ablated_layers"] = [layer.name for layer in some]
        for row in ablate(some, asked.budgets[0], target=asked.target, seed=asked.seed):
            found.append(row)
            yield str(row["part"])


__all__ = ["EXACT", "OF_HEADS", "PARTS", "TORCH", "Settings", "evaluate"]
