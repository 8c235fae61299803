"""Run the hostile laws for as long as wished: ``python -m adaattn_core.testing.hostile``.

The run goes in chunks, each with a seed of its own, and writes its counts after every chunk:
started again with the same ledger file, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from adaattn_core.errors import AdaAttnError
from adaattn_core.plugins.registry import get_backend
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.hostile.definition import HAS_EXTENDED_RANGE
from adaattn_core.testing.hostile.laws import Lie
from adaattn_core.testing.hostile.suite import LAWS, Law, Ledger, Run


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adaattn_core.testing.hostile")
    parser.add_argument("--backend", default="numpy", help="backend under test")
    parser.add_argument(
        "--arrays", default="numpy", help="library and device of the arrays, e.g. torch:cuda"
    )
    parser.add_argument(
        "--repairs", action="store_true",
        help="rows that hidden NaN touched may be computed anew: judged, not compared by bits",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, default=100_000, help="in all")
    parser.add_argument("--chunk", type=int, default=2_000, help="examples between two savings")
    parser.add_argument("--seed", type=int, default=0, help="of the first chunk")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--law", choices=[*LAWS, "all"], default="all")
    parser.add_argument("--ledger", type=Path, default=Path("fuzz-ledger.json"))
    return parser.parse_args()


def _hunt(law: Law, run: Run, examples: int, number: int) -> list[str]:
    """Try to break one law; return the smallest example of each way that was found."""

    @seed(number)
    @settings(
        max_examples=max(examples, 1),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(law.cases)
    def attack(case: Any) -> None:
        law.attack(run, case)

    try:
        attack()
    except ExceptionGroup as group:
        return [_describe(error) for error in group.exceptions]
    except Exception as error:  # whatever it is, it is what the run looks for
        return [_describe(error)]
    return []


def _describe(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    notes = "\n".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}\nat {last.filename}:{last.lineno}\n{notes}"


def main() -> int:
    """Run; 0 if every law held, 1 if not, 2 if the run cannot start."""
    wanted = _parse()
    if not HAS_EXTENDED_RANGE:
        print("the definition needs a longdouble of extended range, which NumPy has not here")
        return 2
    try:
        backend = get_backend(wanted.backend)
        home = ArrayHome.parse(wanted.arrays)
    except AdaAttnError as error:
        print(error)
        return 2
    warnings.simplefilter("error", RuntimeWarning)
    body: dict[str, Any] = {}
    if wanted.ledger.exists():
        body = json.loads(wanted.ledger.read_text(encoding="utf-8"))
    ledger = Ledger.from_json(body) if body else Ledger()
    failures: list[str] = body.get("failures", [])
    chunks, seconds = int(body.get("chunks", 0)), float(body.get("seconds", 0.0))
    laws = {n: law for n, law in LAWS.items() if wanted.law in (n, "all")}
    whole = sum(law.share for law in laws.values())
    began = time.monotonic()
    while ledger.examples.total() < wanted.examples:
        if time.monotonic() - began > 60 * wanted.minutes:
            break
        start = time.monotonic()
        for name, law in laws.items():
            run = Run(
                name, backend, home=home, offered=backend.capabilities().qk_formats,
                bitwise=not wanted.repairs,
                rules=tuple(name for name, _ in backend.capabilities().rules),
            )  # fmt: skip
            found = _hunt(
                law, run, round(wanted.chunk * law.share / whole), wanted.seed + chunks
            )
            for text in found:
                failures.append(f"law {name!r}, seed {wanted.seed + chunks}: {text}")
                print(failures[-1], flush=True)
            ledger.merge(run.ledger)
        chunks += 1
        seconds += time.monotonic() - start
        ledger.save(
            wanted.ledger,
            backend=wanted.backend,
            chunks=chunks,
            seconds=round(seconds, 1),
            failures=failures,
        )
        total = ledger.examples.total()
        print(f"{total} examples, {seconds:.0f} s, {len(failures)} failures", flush=True)
    try:
        ledger.check_shares()
    except Lie as error:
        failures.append(str(error))
        print(error)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
