"""Texts that come with Python, and a multiple-choice task made of one; no download."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaattn_core.files import reading

CODE = ("argparse", "tarfile", "typing", "unittest.mock", "zipfile", "inspect", "subprocess")
CHOICES = 4
LEAST_WORDS = 12
"""Words that a paragraph has, so that it can be told from others."""


def prose() -> str:
    """Return Python's language reference, as ``help()`` prints it (pydoc_data)."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def code() -> str:
    """Return the sources of some modules of Python's standard library."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE)


BUILT_IN: dict[str, Callable[[], str]] = {"prose": prose, "code": code}


def read_text(name: str) -> str:
    """Return a built-in text by name, or that of a file.

    Raises
    ------
    FileError
        If there is no such file.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name)
    with reading(path, needed="a text file, or prose or code", do="check the path"):
        return path.read_text("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Question:
    """Which paragraph goes on? One of the choices does; the others are from elsewhere.

    Attributes
    ----------
    context : str
        Text up to the gap.
    choices : tuple of str
    right : int
    """

    context: str
    choices: tuple[str, ...]
    right: int


def questions(count: int, *, context_characters: int = 4000, seed: int = 0) -> list[Question]:
    """Make questions of Python's language reference.

    Parameters
    ----------
    count : int
    context_characters : int
        At most this much text stands before the gap.
    seed : int
        Which paragraphs are asked for, and in which order their choices stand.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    rng = random.Random(seed)
    pieces = {name: topics[name].split("\n\n") for name in sorted(topics)}
    places = [
        (name, number)
        for name, found in pieces.items()
        for number, piece in enumerate(found)
        if number >= 4 and _is_prose(piece)
    ]
    asked = rng.sample(places, min(count, len(places)))
    made = []
    for name, number in asked:
        before = "\n\n".join(pieces[name][:number])[-context_characters:] + "\n\n"
        elsewhere = [place for place in places if place[0] != name]
        others = [pieces[n][i] for n, i in rng.sample(elsewhere, CHOICES - 1)]
        right = rng.randrange(CHOICES)
        others.insert(right, pieces[name][number])
        made.append(Question(before, tuple(_start(text) for text in others), right))
    return made


def _is_prose(piece: str) -> bool:
    return len(piece.split()) >= LEAST_WORDS and not piece.startswith((" ", "*", "-", ">"))


def _start(piece: str) -> str:
    """Return the first words of a paragraph: choices of like length."""
    return " ".join(piece.split()[: 2 * LEAST_WORDS])
