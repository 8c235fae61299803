"""The whole extension surface: four hooks, one sentence each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("adaattn")
hookimpl = pluggy.HookimplMarker("adaattn")


@hookspec
def adaattn_register_backends(register: Callable[..., None]) -> None:
    """Call ``register(name, "module:factory", probe=..., priority=0)`` for every backend."""


@hookspec
def adaattn_register_policies(register: Callable[..., None]) -> None:
    """Call ``register(name, "module:factory")`` for every policy you bring."""


@hookspec
def adaattn_register_commands(group: Any) -> None:
    """Add commands to the typer application `group` of the ``adaattn`` command line."""


@hookspec
def adaattn_warm_up(say: Callable[[str], None], arch: str | None, jobs: int) -> None:
    """Do what a first call would wait for, or plans be better by; ``say`` what was done.

    ``arch`` names hardware to prepare for that may not be here, ``jobs`` how many processes
    may work at a time.
    """
