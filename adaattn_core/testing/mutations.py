"""Mutated files: every one is read, or refused by a documented error, and never by another.

Valid files of every kind that is read (``.npz``, ``.safetensors``, ``.npy``, plans) are damaged
at random: bytes anywhere, members inside an archive whose checksum is right again, headers, and
the values of a plan. What can still be read is then run. ``python -m
adaattn_core.testing.mutations --count 20000`` prints what became of them, and the first
mutations that ended otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from adaattn_core.api import attention
from adaattn_core.budget import ErrorBudget
from adaattn_core.cli.inputs import read_inputs
from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    DTypeError,
    FileError,
    PlanError,
    ShapeError,
    UnsupportedError,
)
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip, Structure

Errors = tuple[type[AdaAttnError], ...]

OF_FILES: Errors = (FileError, DTypeError, ShapeError, ArgumentError, UnsupportedError)
"""Documented errors of a Q/K/V file: on reading, or because its arrays do not fit together."""
OF_PLANS: Errors = (PlanError, UnsupportedError)
"""Documented errors of a plan: on reading, or because it does not fit or a backend lacks it."""
READ = "read"

LEN, DIM, HEADS = 24, 4, 2
_BUDGET = ErrorBudget(0.1, on_violation="report")
_JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    63,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "dense",
    "f32",
    "\x1b[2J\ud800",
    [],
    [[0, 1]],
    {},
    {"kind": "dense"},
)


# -- valid files -------------------------------------------------------------------------------
def arrays() -> dict[str, Any]:
    """Q/K/V of two heads."""
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((HEADS, LEN, DIM), dtype=np.float32) for n in "qkv"}


def _npz(**entries: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **entries) if len(entries) > 4 else np.savez(stream, **entries)
    return stream.getvalue()


def valid_files() -> dict[str, bytes]:
    """One file of every kind and form that is read, by its suffix and a number."""
    plain = arrays()
    short = {name: x.astype(ml_dtypes.bfloat16) for name, x in plain.items()}
    bits: dict[str, Any] = {name: x.view(np.uint16) for name, x in short.items()}
    seen = np.tri(LEN, dtype=bool)
    bias = np.where(seen, np.float32(0.5), np.float32(-np.inf))
    stacked = io.BytesIO()
    np.save(stacked, np.stack(list(plain.values())))
    return {
        "0.npz": _npz(**plain),
        "1.npz": _npz(**plain, scale=0.5, mask=seen),
        "2.npz": _npz(**bits, dtype="bfloat16", mask=bias),
        "0.safetensors": save({**plain, "scale": np.array([0.5], np.float32), "mask": bias}),
        "1.safetensors": save({**short, "mask": seen}),
        "0.npy": stacked.getvalue(),
        **{
            f"{number}.json": json.dumps(plan.to_json(), indent=1).encode()
            for number, plan in enumerate(_plans())
        },
    }


def _plans() -> list[Plan]:
    structures: tuple[Structure, ...] = (
        Dense(),
        ScoreSkip(tile_q=8, tile_kv=8),
        LowRank(2),
        BlockSparse(tile_q=8, tile_kv=8, group=8, samples=2, band=8),
        BlockSparse(tile_q=8, tile_kv=8, group=8, blocks=((0,), (0, 1), (1, 2))),
        Landmark(band=8, group=16, clusters=2, samples=4, pool=8, tile=8, tail=8),
    )
    formats = (("f32", "f32"), ("i8", "e4m3"), ("f16", "f16"))
    return [
        Plan(
            {
                (0, h): HeadPlan(s, *formats[(n + h) % 3], reason="by hand")
                for h in range(HEADS)
            },
            seed=n,
        )
        for n, s in enumerate(structures)
    ]


# -- mutations ---------------------------------------------------------------------------------
def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy; `name` tells by its suffix what may be damaged from inside."""
    suffix = Path(name).suffix
    inside: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".npz": _mutate_member,
        ".safetensors": _mutate_safetensors_header,
        ".json": _mutate_document,
    }
    if suffix in inside and rng.random() < 0.75:
        return inside[suffix](data, rng)
    return _mutate_bytes(data, rng)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut, up to four times; headers most of all."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not out:
            break
        most = min(len(out), 160) if rng.random() < 0.5 else len(out)
        at = rng.randrange(most)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                extreme = rng.choice((0, 1, 0x7F, 0xFF)).to_bytes() * length
                out[at : at + length] = extreme
            case 3:
                out[at:at] = rng.randbytes(length)
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + rng.choice((8, 64, 512))]
            case _:
                del out[at:]
    return bytes(out)


def _mutate_member(data: bytes, rng: random.Random) -> bytes:
    """Damage members of an archive and close it again: checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        victim = rng.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == victim:
                match rng.randrange(8):
                    case 0:
                        continue
                    case 1:
                        content = b""
                    case 2:
                        name = rng.choice(("q", "k.npy", "mask.npy", "bias.npy", "x/../q.npy"))
                    case 3:
                        content = content[:8] + _with_header(content, rng)
                    case _:
                        content = _mutate_bytes(content, rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two members of one name
                new.writestr(name, content)
    return out.getvalue()


def _with_header(member: bytes, rng: random.Random) -> bytes:
    """Return a member after its version bytes, with another description of its array."""
    descr = rng.choice(
        ("<f4", ">f4", "<f2", "<f8", "<f16", "|O", "|b1", "<i4", "<U2", "|V2", "x")
    )
    shape = tuple(rng.choice((0, 1, 2, LEN, DIM, -1, 2**40)) for _ in range(rng.randint(0, 5)))
    header = {"descr": descr, "fortran_order": rng.choice((True, False, 2)), "shape": shape}
    if rng.random() < 0.2:
        header.pop(rng.choice(list(header)))
    text = repr(header).encode() + b"\n"
    return struct.pack("<H", len(text)) + text + member[-rng.choice((0, 64, 768)) :]


def _mutate_safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """Damage a value of the header and state its new length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        header["mask"] = dict(rng.choice(list(header.values())))
    if rng.random() < 0.3:
        tensor = rng.choice(list(header.values()))
        tensor["dtype"] = rng.choice(("F64", "F16", "BF16", "BOOL", "I32", "F8_E4M3", "U8"))
        size = int(np.prod(tensor["shape"])) or 1
        tensor["shape"] = rng.choice(([size], [size, 1, 1], [1, 0, 1], [2**40, 2**40]))
    else:
        _spoil(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _mutate_document(data: bytes, rng: random.Random) -> bytes:
    """Damage up to three values of a JSON document."""
    body = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        _spoil(body, rng)
    return json.dumps(body).encode()


def _spoil(body: Any, rng: random.Random) -> None:
    """Replace, remove, add or nudge one value somewhere in a document."""
    places = list(_places(body))
    if not places:
        return
    body, key = rng.choice(places)
    inner = body[key]
    match rng.randrange(8):
        case 0 if rng.random() < 0.5:
            del body[key]
        case 1 if isinstance(body, dict):
            body[rng.choice(("kind", "tau", "blocks", "x"))] = deepcopy(rng.choice(_JUNK))
        case 2 if isinstance(body, list):
            body.insert(rng.randrange(len(body) + 1), deepcopy(body[key]))
        case 3 | 4 | 5 | 6 if isinstance(inner, int | float) and not isinstance(inner, bool):
            body[key] = rng.choice((inner * 2, inner + 1, -inner, inner / 2, inner * 64))
        case _:
            body[key] = deepcopy(rng.choice(_JUNK))


def _places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    if isinstance(body, dict | list):
        for key in body if isinstance(body, dict) else range(len(body)):
            yield body, key
            yield from _places(body[key])


# -- what becomes of them ----------------------------------------------------------------------
def outcome(path: Path) -> str:
    """Read a file, and run what was read.

    Returns
    -------
    str
        `READ`, or the name of the documented error.

    Raises
    ------
    Exception
        Whatever else was raised.
    AssertionError
        If the error's message does not have its three lines.
    """
    use, documented = (_use_plan, OF_PLANS) if path.suffix == ".json" else (_use_file, OF_FILES)
    try:
        use(path)
    except documented as error:
        heads = [line.split(":")[0] for line in str(error).split("\n")]
        if (
            heads != ["got", "needed", "do this"]
            or not str(error).replace("\n", "").isprintable()
        ):
            raise AssertionError(f"not three lines of text: {error!r}") from error
        return type(error).__name__
    return READ


def _use_file(path: Path) -> None:
    inputs = read_inputs(path)
    attention(
        inputs.query,
        inputs.key,
        inputs.value,
        mask=Mask.causal("bottom_right") & inputs.mask,
        scale=inputs.scale,
        budget=_BUDGET,
        seed=0,
    )


def _use_plan(path: Path) -> None:
    plan = Plan.load(path)
    plan.explain()
    if Plan.from_json(json.loads(json.dumps(plan.to_json()))) != plan:
        raise AssertionError("a plan that does not survive being saved")
    q, k, v = (x[None] for x in arrays().values())
    attention(q, k, v, mask=Mask.causal(), plan=plan, budget=_BUDGET, seed=0)


@dataclass
class Report:
    """What became of a run of mutations.

    Attributes
    ----------
    outcomes : Counter of (str, str)
        Suffix and outcome.
    failures : list of str
        Mutations that ended otherwise: what rebuilds them, and the traceback.
    seconds : float
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """One row per kind of file, one column per outcome, as Markdown."""
        suffixes = sorted({suffix for suffix, _ in self.outcomes})
        columns = sorted({name for _, name in self.outcomes}, key=lambda n: (n != READ, n))
        rows = [["file", *columns, "in all"]]
        for suffix in suffixes:
            counts = [self.outcomes[suffix, name] for name in columns]
            rows.append([f"`{suffix}`", *map(str, counts), str(sum(counts))])
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def run(count: int, seed: int, folder: Path, only: str = "") -> Report:
    """Mutate `count` files, in turn of every kind, and use them.

    Parameters
    ----------
    count : int
    seed : int
        With the mutation's number it rebuilds each one.
    folder : Path
        Where the files are written, one after the other under the same names.
    only : str
        Ending of the names of files that are mutated; default all.
    """
    report, valid = Report(), valid_files()
    names = [name for name in valid if name.endswith(only)]
    start = time.perf_counter()
    for number in range(count):
        name = names[number % len(names)]
        data = mutated(name, valid[name], random.Random(f"{seed}/{number}"))
        path = folder / name
        path.write_bytes(data)
        suffix = Path(name).suffix
        try:
            report.outcomes[suffix, outcome(path)] += 1
        except Exception as error:  # finding these is what it is for
            report.outcomes[suffix, f"undocumented {type(error).__name__}"] += 1
            report.failures.append(f"{name}, seed {seed}/{number}:\n{traceback.format_exc()}")
    report.seconds = time.perf_counter() - start
    return report


def main() -> int:
    """Run from the command line; exit code 1 if any mutation ended otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="ending of the files' names, e.g. .npz")
    choice = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(choice.count, choice.seed, Path(folder), choice.only)
    sys.stdout.write(report.table() + f"\n\n{choice.count} in {report.seconds:.0f} s\n")
    for failure in report.failures[:10]:
        sys.stdout.write(f"\n{failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
