"""Drawings of how things go: a call, and the Hopper kernel's pipeline."""

from __future__ import annotations

from pathlib import Path

from svg import Drawing

START, STEP, HALF = 150, 124, 62
"""Pixels: where time begins, one tile, and one product of it."""
CORE, BACKEND, POLICY, ANSWER = "#f6f4ee", "#e3ecf5", "#fdf0d9", "#e2f1ea"


def draw_call() -> Path:
    """The way of a call, step by step, with who does what and the loop of escalation."""
    drawing = Drawing(740, 470, "The way of a call: check, measure, decide, run, certify")
    wide, high = 200, 84
    columns, rows = (20, 270, 520), (48, 196, 344)
    drawing.text(20, 26, "you: query, key, value, mask, and a budget", "text")
    steps = (
        (0, 0, CORE, "problem", "every check, once,", "at the door"),
        (1, 0, BACKEND, "measure", "facts about each head;", "no decision"),
        (2, 0, POLICY, "decide", "facts + budget -> plan;", "pure, touches no array"),
        (2, 1, BACKEND, "run", "exactly the plan,", "or an error"),
        (1, 1, CORE, "certify", "a theorem, or fresh rows", "computed exactly"),
        (0, 1, ANSWER, "result", "output, plan, certificate,", "provenance"),
        (2, 2, POLICY, "escalate", "a safer plan for the", "heads that miss"),
    )
    for column, row, fill, *lines in steps:
        drawing.box(columns[column], rows[row], wide, high, *lines, fill=fill)
    middle = [y + high / 2 for y in rows]
    drawing.arrow((220, middle[0]), (268, middle[0]))
    drawing.arrow((470, middle[0]), (518, middle[0]))
    drawing.arrow((620, rows[0] + high), (620, rows[1] - 2))
    drawing.text(612, 160, "plan: a structure and", "note", "end")
    drawing.text(612, 176, "two formats for every head", "note", "end")
    drawing.arrow((520, middle[1]), (472, middle[1]))
    drawing.arrow((270, middle[1]), (222, middle[1]))
    drawing.text(245, middle[1] - 10, "kept", "note", "middle")
    drawing.arrow((370, rows[1] + high), (370, middle[2]), (518, middle[2]), dash="5 4")
    drawing.text(380, middle[2] - 10, "upper > budget", "note")
    drawing.arrow((620, rows[2]), (620, rows[1] + high + 2), dash="5 4")
    drawing.text(628, 320, "only these heads", "note")
    for number, (fill, who) in enumerate(
        ((CORE, "core"), (BACKEND, "backend"), (POLICY, "policy"))
    ):
        drawing.box(24, 352 + 24 * number, 16, 16, fill=fill, radius=3)
        drawing.text(48, 365 + 24 * number, who, "note")
    drawing.text(
        20,
        452,
        "The safest plan is dense in float64; a head that misses even then is an error.",
        "note",
    )
    return drawing.save("call")


SHADES = ("#eef4fa", "#d5e5f2", "#b9d3e9", "#9cc0df", "#7fadd4")
TILES = 4


def draw_pipeline() -> Path:
    """Time lines of two consumer warpgroups, beside the copies that feed them."""
    drawing = Drawing(740, 408, "Pipeline of the Hopper kernel: copies, products, exponentials")
    drawing.text(16, 46, "copies")
    drawing.text(16, 62, "(one thread)", "note")
    for tile in range(TILES + 1):
        x = START + tile * STEP
        for at, name in ((0, f"K{tile}"), (HALF, f"V{tile}")):
            drawing.box(x + at - 30, 30, HALF - 6, 32, name, fill=SHADES[tile], kinds=("note",))
    _warpgroup(drawing, 92, 0, "warpgroup 1")
    _warpgroup(drawing, 206, HALF, "warpgroup 2")
    drawing.arrow((START - 30, 316), (728, 316), colour="#888")
    drawing.text(728, 332, "time", "note", "end")
    notes = (
        "S = Q·Kᵀ of a tile and O += P·V of the tile before it are started together; the",
        "exponentials of the tile run under that output product. Two or three warpgroups of 64",
        "query rows share the keys and are not in step: one computes while another",
        "waits. Copies run ahead by as many stages as fit, across work items. Not to scale.",
    )
    for number, line in enumerate(notes):
        drawing.text(16, 346 + 17 * number, line, "note")
    return drawing.save("pipeline")


def _warpgroup(drawing: Drawing, y: float, delay: float, name: str) -> None:
    drawing.text(16, y + 21, name)
    drawing.text(16, y + 37, "products", "note")
    drawing.text(16, y + 71, "exponentials", "note")
    for tile in range(TILES):
        x = START + tile * STEP + delay
        fill = SHADES[tile]
        drawing.box(x, y + 6, HALF - 3, 34, f"S{tile}", fill=fill, kinds=("text",), radius=3)
        drawing.box(
            x + HALF, y + 48, HALF - 3, 34, f"exp S{tile}", fill=fill, kinds=("note",), radius=3
        )
        if tile:
            drawing.box(
                x + HALF, y + 6, HALF - 3, 34, f"P{tile - 1}·V{tile - 1}",
                fill=SHADES[tile - 1], kinds=("note",), radius=3,
            )  # fmt: skip
