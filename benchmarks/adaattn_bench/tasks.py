"""What a model makes of a budget: perplexity, needles, greedy text, multiple choice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from adaattn_bench.devices import torch_module
from adaattn_bench.models import Model, Setting
from adaattn_bench.texts import Question

CODE = "493027518664"
NEEDLE = f" The access code of the northern archive is {CODE}."
QUESTION = (
    "\n\nQuestion: what is the access code of the northern archive?"
    "\nAnswer: The access code of the northern archive is"
)


def _nats(logits: Any, ids: Any) -> Any:
    """Nats of every token but the first."""
    cross_entropy = torch_module().nn.functional.cross_entropy
    return cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


def perplexity(model: Model, setting: Setting, windows: Sequence[Any]) -> dict[str, Any]:
    """Perplexity of fixed windows, each read without what comes before it.

    Parameters
    ----------
    model : Model
    setting : Setting
    windows : sequence of tensor
        Token numbers, one window each.

    Returns
    -------
    dict
        ``perplexity`` of all tokens but each window's first, ``windows`` (nats a token of
        each), ``seconds``, and what heads did.
    """
    started = time.perf_counter()
    nats, facts = [], []
    for ids in windows:
        logits, said = model.logits(ids, setting)
        nats.append(_nats(logits, ids).numpy())
        facts.append(said)
    return {
        "perplexity": float(np.exp(np.mean(np.concatenate(nats)))),
        "windows": [float(x.mean()) for x in nats],
        "seconds": time.perf_counter() - started,
        **_joined(facts),
    }


def _joined(facts: Sequence[dict[str, float]]) -> dict[str, float]:
    known = [f for f in facts if f]
    if not known:
        return {}
    return {
        "share": float(np.mean([f["share"] for f in known])),
        "upper_max": max(f["upper_max"] for f in known),
    }


def needle(
    model: Model, setting: Setting, prose: Any, length: int, depth: float
) -> dict[str, Any]:
    """Ask for a code that stands at a depth of a text of a length.

    Returns
    -------
    dict
        ``nats`` a token of the code, how many of its ``tokens`` are the most likely ones
        (``right``), and what heads did.
    """
    torch = torch_module()
    hidden, question, answer = (model.encode(t) for t in (NEEDLE, QUESTION, f" {CODE}"))
    room = max(length - len(hidden) - len(question) - len(answer), 0)
    split = int(depth * room)
    ids = torch.cat([prose[:split], hidden, prose[split:room], question, answer])
    logits, facts = model.logits(ids, setting)
    nats = _nats(logits, ids)[-len(answer) :]
    predicted = logits[-len(answer) - 1 : -1].argmax(-1)
    right = int((predicted == answer).sum())
    return {
        "length": length, "depth": depth, "nats": float(nats.mean()), "right": right,
        "tokens": len(answer), **facts,
    }  # fmt: skip


def greedy(
    model: Model, setting: Setting, ids: Any, count: int, reference: Sequence[int]
) -> dict[str, Any]:
    """Continue a prompt greedily; compare with a reference (empty: this is the reference)."""
    tokens, prompt = model.generate(ids, count, setting)
    same = [a == b for a, b in zip(tokens, reference or tokens, strict=True)]
    return {
        "agreement": float(np.mean(same)),
        "first_difference": None if all(same) else same.index(False),
        "tokens": tokens,
        **prompt,
    }


def choices(
    model: Model, setting: Setting, asked: Sequence[Question], context_tokens: int
) -> Iterator[dict[str, Any]]:
    """Answer questions by the mean nats of each choice; yields what is known after each.

    Yields
    ------
    dict
        ``right`` of ``asked`` so far, the ``answers`` taken, and what heads did.
    """
    torch = torch_module()
    answers: list[int] = []
    facts = []
    right = 0
    for question in asked:
        context = model.encode(question.context)[-context_tokens:]
        scores = []
        for choice in question.choices:
            tokens = model.encode(choice)
            ids = torch.cat([context, tokens])
            logits, said = model.logits(ids, setting)
            facts.append(said)
            scores.append(float(_nats(logits, ids)[-len(tokens) :].mean()))
        answers.append(int(np.argmin(scores)))
        right += answers[-1] == question.right
        yield {"right": right, "asked": len(answers), "answers": answers, **_joined(facts)}
