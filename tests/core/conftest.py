"""Fixtures of the core tests: the command line in this process, and a file for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaattn_core.cli.app import main

LEN, DIM, HEADS_Q, HEADS_KV = 512, 32, 4, 2


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``adaattn ...`` in this process; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of heads with local and sparse attention, so that there is something to choose."""
    path = tmp_path_factory.mktemp("qkv") / "layer07.npz"
    rng = np.random.default_rng(1)
    walk = rng.standard_normal((HEADS_KV, LEN, DIM)).cumsum(axis=1) / 8
    k = walk / np.linalg.norm(walk, axis=-1, keepdims=True) * 8
    q = np.repeat(k, HEADS_Q // HEADS_KV, axis=0) + rng.standard_normal((HEADS_Q, LEN, DIM)) / 4
    v = rng.standard_normal((HEADS_KV, LEN, DIM))
    arrays: dict[str, Any] = {
        n: x.astype(np.float32) for n, x in zip("qkv", (q, k, v), strict=True)
    }
    np.savez(path, **arrays, scale=0.3)
    return path
