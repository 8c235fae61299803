"""Starting what a group of heads takes: a launch of one kernel, or structures to be chosen."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.structure import BlockSparse, Landmark
from adaattn_cuda.device.launch import Launch
from adaattn_cuda.device.library import library_of
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.dispatch import make_launch, make_task
from adaattn_cuda.kernels.sm90_attn_fwd_8bit import EightBitLaunch
from adaattn_cuda.kernels.smxx_probe import Allocate
from adaattn_cuda.kernels.task import Arrays, BlockHeads, Recipe, addresses
from adaattn_cuda.quantised import QuantisedRun
from adaattn_cuda.recent import Recent
from adaattn_cuda.sampled import FarRun, chosen_blocks, run_landmarks

__all__ = ["LAYOUTS_REMEMBERED", "Started", "Starts", "allocator"]

LAYOUTS_REMEMBERED = 256
Started = tuple[Launch | FarRun, QuantisedRun | None, tuple[HeadIndex, ...] | None]
"""A launch, the scales of 8-bit operands, and its heads; None stands for all of them."""


class Starts:
    """Starts groups of heads; launches of the same layout are made once."""

    def __init__(self) -> None:
        self._launches: Recent[Launch] = Recent(LAYOUTS_REMEMBERED)

    @property
    def remembered(self) -> int:
        """Number of launches that are remembered."""
        return len(self._launches)

    def one(
        self,
        problem: AttentionProblem,
        arrays: Arrays,
        sinks: ArrayView | None,
        layout: Hashable,
        recipe: Recipe,
        heads: tuple[HeadIndex, ...] | None,
        stream: int,
    ) -> tuple[Launch, QuantisedRun | None]:
        """Start one kernel for heads that run alike, known beforehand."""
        lse, allowed, bias = arrays[4:]
        known_by = (
            layout,
            lse[1:],
            allowed[1:] if allowed else None,
            bias[1:] if bias else None,
            (problem.scale, recipe, heads, problem.softcap, sinks is None),
        )
        launch = self._launches.get(known_by)
        if launch is None:
            launch = make_launch(problem, arrays, recipe, heads, stream, sinks)  # may compile
            self._launches.put(known_by, launch)
        library = library_of(problem.query)
        # Asked for as floats: allocators align far beyond what is needed.
        scratch = [
            library.empty((-(-size // 4),), "f32", problem.query)
            for size in launch.scratch_bytes
        ]
        places = tuple(map(library.pointer, scratch))
        launch.start((*addresses(arrays, sinks), *places), lse.device, stream)
        if isinstance(launch, EightBitLaunch):
            return launch, launch.quantised(scratch[-1], places[-1])
        return launch, None

    def chosen(
        self,
        problem: AttentionProblem,
        plan: Plan,
        arrays: Arrays,
        sinks: ArrayView | None,
        recipe: Recipe,
        heads: tuple[HeadIndex, ...] | None,
        stream: int,
    ) -> tuple[list[Started], set[HeadIndex]]:
        """Start heads whose structures are chosen from sampled rows; also return odd ones.

        Odd are heads whose sampled rows saw NaN or Inf: nothing of them has run.
        """
        allocate = allocator(problem)
        index = tuple(plan.heads if heads is None else heads)
        plain = recipe._replace(sampled=False)
        task = make_task(problem, arrays, plain, index, sinks)
        blocks, far = {}, {}
        for i in index:
            structure = plan[i].structure
            if isinstance(structure, BlockSparse):
                blocks[i] = structure
            elif isinstance(structure, Landmark):
                far[i] = structure
        started: list[Started] = []
        given, odd = chosen_blocks(task, blocks, plan.seed, allocate, stream)
        if given:
            recipe = plain._replace(blocks=BlockHeads(given))
            launch = make_launch(problem, arrays, recipe, tuple(given), stream, sinks)
            launch.start(addresses(arrays, sinks), task.query.device, stream)
            started.append((launch, None, tuple(given)))
        runs, lost = run_landmarks(task, far, plan.seed, allocate, stream)
        started += [(run, None, run.heads()) for run in runs]
        return started, odd | lost


def allocator(problem: AttentionProblem) -> Allocate:
    """Return what allocates bytes beside a problem's arrays."""
    library = library_of(problem.query)

    def allocate(size_bytes: int) -> tuple[Any, int]:
        made = library.empty((max(-(-size_bytes // 4), 4),), "f32", problem.query)
        return made, library.pointer(made)

    return allocate
