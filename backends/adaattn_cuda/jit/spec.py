"""KernelSpec: which kernel, specialised how, for which architecture."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLAIN", "SINKS", "SOFTCAP", "KernelSpec", "Trait"]

PLAIN, SOFTCAP, SINKS = 0, 1, 2
"""Bits of a score rule; the twin of ``ScoreRule`` in softmax/score_rule.cuh."""

Trait = bool | int | str


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of one kernel: everything that decides its machine code.

    Parameters
    ----------
    stem : str
        File stem, e.g. ``"sm80_attn_fwd"``; also the C++ namespace.
    traits : tuple of bool, int or str
        Template arguments of ``Traits``, in order; a str is C++ text (a type or enumerator).
    smem_bytes : int
        Dynamic shared memory the host will ask for; the unit asserts that the kernel agrees.
    arch : str
        Real architecture, e.g. ``"sm_80"`` or ``"sm_90a"``.
    options : tuple of str
        Further ptxas options.
    folder : str
        Of the header, below ``adaattn/``.
    rule : int
        ``ScoreRule`` of softmax/score_rule.cuh: 0 none, 1 softcap, 2 sinks, 3 both. The kernel
        takes ``RuledParams`` then.
    params : str
        Name of its parameter block; empty: ``Params``, or ``RuledParams`` under a rule.
    """

    stem: str
    traits: tuple[Trait, ...]
    smem_bytes: int
    arch: str
    options: tuple[str, ...] = ()
    folder: str = "attn"
    rule: int = 0
    params: str = ""

    @property
    def header(self) -> str:
        """Include name of the kernel's source."""
        return f"adaattn/{self.folder}/{self.stem}.cuh"

    @property
    def name(self) -> str:
        """Short printable name: the stem, its template arguments, and its score rule."""
        rule = ("", "+softcap", "+sinks", "+softcap+sinks")[self.rule]
        return f"{self.stem}<{', '.join(cpp(trait) for trait in self.traits)}>{rule}"


def cpp(trait: Trait) -> str:
    """C++ text of one template argument."""
    if isinstance(trait, bool):
        return "true" if trait else "false"
    return str(trait)
