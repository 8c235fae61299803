"""Backward passes on Hopper's matrix unit, against float64."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from adaattn_core.mask import Mask
from adaattn_core.plugins.registry import get_backend
from adaattn_cuda import backward
from adaattn_cuda.device import driver
from adaattn_cuda.recent import Recent

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    # Of autograd's own thread, where the reference runs.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

_path = Path(__file__).with_name("held_gradients.py")
_spec = importlib.util.spec_from_file_location("held_gradients", _path)
held = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(held)
problem_of = held.problem_of


@pytest.fixture
def backend() -> Any:
    if driver.device_facts(0).arch != "sm_90a":
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(0)
    return get_backend("cuda")


def check(backend: Any, p: Any, **more: Any) -> None:
    """Hold it to the rule, having made sure that Hopper's kernel ran."""
    backward._prepared = Recent(256)
    held.check(backend, p, **more)
    names = [found[0].launch.name for found in backward._prepared._entries.values()]
    assert names
    assert all(name.startswith("sm90_attn_bwd_f16") for name in names)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64), (64, 128), (96, 40), (8, 8)])
def test_dims(backend: Any, dtype: str, dims: tuple[int, int]) -> None:
    check(backend, problem_of(dtype, 2, (4, 4), (256, 256), dims))
    check(backend, problem_of(dtype, 2, (4, 2), (200, 333), dims))


MASKS = {
    "causal": (Mask.causal("top_left"), (512, 512)),
    "causal_tl": (Mask.causal("top_left"), (300, 200)),
    "causal_br": (Mask.causal("bottom_right"), (300, 777)),
    "causal_blind": (Mask.causal("bottom_right"), (300, 70)),
    "window": (Mask.sliding_window(100, 30, "bottom_right"), (500, 400)),
    "narrow window": (Mask.sliding_window(3, 0, "top_left"), (700, 700)),
    "lengths": (Mask.key_lengths([70, 0]), (150, 90)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("dim", "in_order"), [(64, False), (128, False), (128, True)])
def test_interval_masks(backend: Any, name: str, dim: int, in_order: bool) -> None:
    mask, lens = MASKS[name]
    p = problem_of("bf16", 2, (4, 2), lens, (dim, dim), mask)
    check(backend, p, lse=True, deterministic=in_order)


@pytest.mark.parametrize("name", ["causal_blind", "lengths", "window"])
@pytest.mark.parametrize("in_order", [False, True])
def test_sinks(backend: Any, name: str, in_order: bool) -> None:
    mask, lens = MASKS[name]
    p = problem_of("bf16", 2, (4, 2), lens, (64, 64), mask, sinks=(0.5, -3.0, 8.0, 2.0))
    check(backend, p, lse=True, deterministic=in_order)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_every_time(backend: Any, dim: int, causal: bool) -> None:
    mask = Mask.causal("top_left") if causal else None
    p = problem_of("bf16", 2, (8, 4), (2048, 2048), (dim, dim), mask)
    check(backend, p, deterministic=True)


def test_ragged(backend: Any) -> None:
    cu_q, cu_kv = [0, 30, 30, 401, 601], [0, 20, 50, 300, 700]
    mask = Mask.ragged(cu_q, cu_kv) & Mask.causal("bottom_right")
    check(backend, problem_of("bf16", 1, (4, 2), (601, 700), (128, 128), mask))
    ragged = problem_of("bf16", 1, (4, 2), (601, 700), (128, 128), mask)
    check(backend, ragged, deterministic=True)
    cu = list(range(0, 3 * 140 + 1, 3))
    lens = (cu[-1], cu[-1])
    check(backend, problem_of("bf16", 1, (2, 2), lens, (64, 64), Mask.ragged(cu, cu)))


def test_strides(backend: Any) -> None:
    check(backend, problem_of("bf16", 2, (4, 2), (200, 150), (64, 64), layout="bshd"))


def test_what_is_not_finite_is_done_again(backend: Any) -> None:
    """NaN in hidden keys, and rows whose lse is too large, by the sm80 family."""
    p = problem_of("bf16", 2, (4, 2), (150, 90), (64, 64), Mask.key_lengths([60, 60]))
    p.key[:, :, 60:], p.value[:, :, 60:] = math.inf, math.nan
    check(backend, p)
    p = problem_of("bf16", 1, (2, 2), (150, 90), (64, 64), Mask.causal("bottom_right"))
    p.query[:, :, :40] = math.nan  # rows that see nothing
    check(backend, p)
