"""The house: packages, their rooms, and who knows whom.

A room is named by its modules; a test holds the names to the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svg import Drawing

HOUSE, ROOM, MAIN = "#f6f4ee", "#ffffff", "#e3ecf5"
WIDTH, GAP, HIGH = 740, 8, 44
"""Pixels: of the drawing, between rooms, of a room."""


@dataclass(frozen=True)
class House:
    """A package: rows of rooms, a room as (names of modules, what it is for)."""

    package: str
    note: str
    rows: tuple[tuple[tuple[str, str], ...], ...]

    def height(self) -> float:
        """Pixels."""
        return 34 + len(self.rows) * (HIGH + GAP)


TORCH = House(
    "adaattn_torch",
    "PyTorch; knows core alone",
    (
        (
            ("entries, functional", "the ways in"),
            ("prepare, masks", "a checked call"),
            ("forward, gradient", "to a backend"),
            ("cache", "generation"),
            ("backend", "any device"),
        ),
    ),
)
CORE = House(
    "adaattn_core",
    "NumPy and SciPy; knows no backend and no device library",
    (
        (
            ("cli, report", "adaattn run, pages"),
            ("plugins", "finds backends, policies"),
            ("policies", "facts + budget -> plan"),
            ("testing", "conformance kit"),
        ),
        (
            ("api", "attention(): the door"),
            ("problem, mask", "every check, once"),
            ("pipeline", "the steps, in order"),
            ("backend, facts", "the contract"),
        ),
        (
            ("budget, costs, formats", "asked; prices; data"),
            ("plan, structure, stats", "chosen; measured"),
            ("certificates, escalation", "said of the output"),
            ("pages, paged", "caches on pages"),
        ),
        (("bounds", "one theorem per function, rounded outward"),),
    ),
)
REFERENCE = House(
    "adaattn_reference",
    "",
    (
        (("backend", "Backend, Measures"),),
        (("measure, exact", "facts; exact rows"),),
        (("dense, landmark", "a structure a file"),),
    ),
)
CUDA = House(
    "adaattn_cuda",
    "each row knows those below",
    (
        (("backend", "Backend, Forwards, Decides"),),
        (("forward", "the shortest way"), ("adaptive, planner", "plans on the device")),
        (("dispatch, facts", "the choice of a kernel"),),
        (("kernels", "launches, a file per kernel"),),
        (("device", "driver, arrays"), ("tuning", "tiles, stages: speed only")),
        (("jit", "compiler, cache"), ("work", "work lists, geometry")),
    ),
)
KERNELS = House(
    "adaattn_kernels_cu",
    "",
    (
        (("attn, plan, quant", "kernels"),),
        (("mask, softmax, tile", "their parts"),),
        (("ptx, common", "one instruction each"),),
    ),
)
HOUSES = (TORCH, CORE, REFERENCE, CUDA, KERNELS)


def _draw(
    drawing: Drawing, house: House, x: float, y: float, width: float, high: float
) -> None:
    drawing.box(x, y, width, high, fill=HOUSE)
    drawing.text(x + 10, y + 21, house.package, "title")
    if house.note:
        drawing.text(x + width - 10, y + 21, house.note, "note", "end")
    each = (high - 34) / len(house.rows)
    for row, rooms in enumerate(house.rows):
        wide = (width - GAP * (len(rooms) + 1)) / len(rooms)
        for column, (names, use) in enumerate(rooms):
            fill = MAIN if names == "pipeline" else ROOM
            drawing.box(
                x + GAP + column * (wide + GAP),
                y + 32 + row * each,
                wide,
                each - GAP,
                names,
                use,
                fill=fill,
                stroke="#b9b19d",
                kinds=("text", "note"),
            )


def draw_architecture() -> Path:
    """Draw all houses, and the arrows between them."""
    between = 46
    core_y = 8 + TORCH.height() + between
    low_y = core_y + CORE.height() + between
    low = CUDA.height()
    height = low_y + low + 34
    drawing = Drawing(WIDTH, round(height), "Packages, their rooms, and who knows whom")
    left, middle, right = 180, 348, 180
    cuda_x = 8 + left + 8
    kernels_x = cuda_x + middle + 8
    _draw(drawing, TORCH, 8, 8, WIDTH - 16, TORCH.height())
    _draw(drawing, CORE, 8, core_y, WIDTH - 16, CORE.height())
    _draw(drawing, REFERENCE, 8, low_y, left, low)
    _draw(drawing, CUDA, cuda_x, low_y, middle, low)
    _draw(drawing, KERNELS, kernels_x, low_y, right, low)
    drawing.arrow((90, 8 + TORCH.height()), (90, core_y - 1))
    drawing.text(98, core_y - 18, "imports", "note")
    drawing.arrow((670, core_y), (670, 9 + TORCH.height()), dash="5 4")
    drawing.text(662, core_y - 18, "found by name", "note", "end")
    for x, name in ((60, "imports"), (cuda_x + 60, "imports")):
        drawing.arrow((x, low_y), (x, core_y + CORE.height() + 1))
        drawing.text(x + 8, low_y - 18, name, "note")
    for x in (128, cuda_x + 190):
        drawing.arrow((x, core_y + CORE.height()), (x, low_y - 1), dash="5 4")
        drawing.text(x + 8, low_y - 18, "found by name", "note")
    drawing.arrow((kernels_x + 90, low_y - 24), (kernels_x + 90, low_y - 1))
    drawing.line(cuda_x + middle - 30, low_y - 24, kernels_x + 90, low_y - 24, "#444")
    drawing.line(cuda_x + middle - 30, low_y - 24, cuda_x + middle - 30, low_y, "#444")
    drawing.text(kernels_x + 98, low_y - 12, "reads", "note")
    drawing.text(
        10, height - 12, "Backends do not know each other. Import contracts hold the "
        "code to this picture.", "note",
    )  # fmt: skip
    return drawing.save("architecture")
