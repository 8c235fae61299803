"""Threads: settings of the process come back, bits do not depend on who else is at work."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from adaattn_core import Mask, attention
from adaattn_core.policies import FixedPolicy
from adaattn_core.structure import Landmark, LowRank
from adaattn_reference.threads import SMALL_SCORES, _blas, map_heads


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_overlapping_calls_restore_what_they_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one in leaves first, so each saw the other's settings."""
    monkeypatch.setenv("ADAATTN_NUM_THREADS", "3")  # two and three workers: a pool for each
    first_inside, second_inside, first_gone = (threading.Event() for _ in range(3))

    def first(_: int) -> None:
        first_inside.set()
        assert second_inside.wait(20)

    def second(_: int) -> None:
        second_inside.set()
        assert first_gone.wait(20)
        pools = _blas("scipy.linalg" in sys.modules).info()
        assert {p["num_threads"] for p in pools if p["user_api"] == "blas"} == {1}

    with threadpool_limits(3, "blas"):
        before = blas_threads(), sys.getswitchinterval()
        one = threading.Thread(target=map_heads, args=(first, range(2), SMALL_SCORES))
        one.start()
        assert first_inside.wait(20)
        two = threading.Thread(target=map_heads, args=(second, range(3), SMALL_SCORES))
        two.start()
        one.join(20)
        first_gone.set()
        two.join(20)
        assert (blas_threads(), sys.getswitchinterval()) == before


def test_a_failing_call_restores_them_too() -> None:
    before = blas_threads(), sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError):
        map_heads(lambda n: 1 // n, range(3), SMALL_SCORES)
    assert (blas_threads(), sys.getswitchinterval()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_during_a_call_finds_the_settings_of_before() -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(_: int) -> None:
        inside.set()
        assert done.wait(20)

    with threadpool_limits(3, "blas"):
        before = blas_threads()
        call = threading.Thread(target=map_heads, args=(wait, range(2), SMALL_SCORES))
        call.start()
        assert inside.wait(20)
        child = os.fork()
        if not child:
            held = False
            try:
                held = blas_threads() == before and map_heads(abs, [-1], 0) == [1]
            finally:  # whatever was raised: a child must not run the other tests
                os._exit(0 if held else 1)
        done.set()
        call.join(20)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert blas_threads() == before


def test_seeded_calls_give_the_same_bits_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 3, 600, 48), dtype=np.float32) for _ in range(3))
    choices: list[dict[str, Any]] = [
        {"budget": 0.1},
        {"policy": FixedPolicy(LowRank(20))},
        {"policy": FixedPolicy(Landmark(group=256, clusters=4)), "mask": Mask.causal()},
        {"policy": FixedPolicy(qk="i8", pv="e4m3", rounding="stochastic")},
    ]

    def bits(number: int) -> bytes:
        result = attention(q, k, v, seed=number, **choices[number])
        upper = result.certificate.upper
        return bytes(result.out.tobytes() + result.lse.tobytes() + upper.tobytes())

    expected = [bits(number) for number in range(len(choices))]
    found: list[tuple[int, bytes]] = []

    def work(start: int) -> None:
        for step in range(len(choices)):
            number = (start + step) % len(choices)
            found.append((number, bits(number)))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 * len(choices)
    assert all(value == expected[number] for number, value in found)
    monkeypatch.setenv("ADAATTN_NUM_THREADS", "1")
    assert [bits(number) for number in range(len(choices))] == expected
