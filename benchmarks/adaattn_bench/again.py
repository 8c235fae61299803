"""The command that measures a kept report again, for the head of its page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BENCH = ("device", "dims", "lengths", "tokens", "batch", "dtype", "budgets", "rounds", "seed")
EVAL = (
    "tokens", "windows", "lengths", "depths", "prompt_tokens", "greedy_tokens", "questions",
    "context_tokens", "heads", "head_tokens", "ablation_layers", "target", "seed",
)  # fmt: skip
"""Settings that are options of the same name."""


def command_of(report: Mapping[str, Any]) -> str:
    """Return the command line, files without their folders."""
    settings = report["settings"]
    options = _bench(settings) if report["kind"] == "bench" else _eval(settings)
    return shlex.join(["adaattn", str(report["kind"]), *options])


def _bench(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from ("--data", Path(settings["source"]).name)
    yield from ("--heads", f"{settings['heads_q']}:{settings['heads_kv']}")
    yield from _named(settings, BENCH)


def _eval(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from ("--model", Path(settings["model"]).name)
    for text in settings["texts"]:
        yield from ("--text", Path(text).name)
    yield from ("--budgets", _word(settings["budgets"]), "--parts", _word(settings["parts"]))
    yield from _named(settings, EVAL)
    if settings["hurried"]:
        yield "--hurried"


def _named(settings: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if settings[name] is not None:
            yield from (f"--{name.replace('_', '-')}", _word(settings[name]))


def _word(value: Any) -> str:
    """Return a value as its option takes it: lists by commas, and `none` for no budgets."""
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
