"""Backward passes of the sm80 family on a device, against float64."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from adaattn_core.mask import Mask
from adaattn_core.plugins.registry import get_backend
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
check, problem_of = held.check, held.problem_of


@pytest.fixture(autouse=True)
def _sm80_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's own kernel is asked in its own tests."""
    monkeypatch.setattr("adaattn_cuda.dispatch.HOPPER_BACKWARD", False)
    monkeypatch.setattr("adaattn_cuda.backward._prepared", Recent(256))


@pytest.fixture
def backend() -> Any:
    torch.manual_seed(0)
    return get_backend("cuda")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 32), (40, 24), (37, 51)])
def test_formats_and_dims(backend: Any, dtype: str, dims: tuple[int, int]) -> None:
    check(backend, problem_of(dtype, 2, (4, 2), (200, 333), dims), deterministic=True)


@pytest.mark.parametrize(("dtype", "dim"), [("bf16", 256), ("f16", 192), ("f32", 192)])
def test_long_rows(backend: Any, dtype: str, dim: int) -> None:
    check(backend, problem_of(dtype, 1, (2, 1), (300, 200), (dim, dim)), deterministic=True)


MASKS = {
    "causal_tl": (Mask.causal("top_left"), (300, 200)),
    "causal_br": (Mask.causal("bottom_right"), (300, 777)),
    "causal_blind": (Mask.causal("bottom_right"), (300, 70)),
    "window": (Mask.sliding_window(100, 30, "bottom_right"), (500, 400)),
    "lengths": (Mask.key_lengths([70, 0]), (150, 90)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_interval_masks(backend: Any, name: str, dtype: str) -> None:
    mask, lens = MASKS[name]
    check(backend, problem_of(dtype, 2, (4, 2), lens, (64, 64), mask), lse=True)


def test_ragged(backend: Any) -> None:
    cu_q, cu_kv = [0, 30, 30, 400, 601], [0, 20, 50, 300, 700]
    mask = Mask.ragged(cu_q, cu_kv) & Mask.causal("bottom_right")
    check(backend, problem_of("bf16", 1, (4, 2), (601, 700), (128, 128), mask))
    cu = list(range(0, 3 * 140 + 1, 3))
    check(
        backend, problem_of("bf16", 1, (2, 2), (cu[-1], cu[-1]), (64, 64), Mask.ragged(cu, cu))
    )


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_array_masks(backend: Any, dtype: str) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    allowed = torch.rand(2, 1, 200, 150, device="cuda", generator=generator) < 0.5
    allowed[:, :, 3] = False
    check(backend, problem_of(dtype, 2, (4, 2), (200, 150), (64, 64), Mask.boolean(allowed)))
    for shape in ((2, 4, 200, 150), (1, 4, 1, 150), (200, 1)):
        bias = torch.randn(shape, device="cuda", generator=generator)
        mask = Mask.additive(bias) & Mask.causal("top_left")
        check(backend, problem_of(dtype, 2, (4, 2), (200, 150), (64, 64), mask))
    lowest = torch.zeros(200, 150, device="cuda")
    lowest[50:60] = lowest[:, 100:] = torch.finfo(torch.bfloat16).min  # finite in both formats
    lowest[7] = -1e5
    check(backend, problem_of(dtype, 2, (4, 2), (200, 150), (64, 64), Mask.additive(lowest)))


def test_strides(backend: Any) -> None:
    check(backend, problem_of("bf16", 2, (4, 2), (200, 150), (64, 64), layout="bshd"))
    p = problem_of("bf16", 2, (4, 2), (200, 150), (65, 65))
    cut = held.AttentionProblem.from_arrays(
        p.query[..., :64], p.key[..., :64], p.value[..., :64]
    )
    check(backend, cut)


def test_nothing_leaks(backend: Any) -> None:
    p = problem_of("bf16", 2, (4, 2), (150, 90), (64, 64), Mask.key_lengths([60, 60]))
    p.key[:, :, 60:], p.value[:, :, 60:] = math.inf, math.nan
    check(backend, p)
