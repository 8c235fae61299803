"""`attention_forward`: one launch per layout, found again by everything but the addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from adaattn_core.errors import ShapeError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda import forward
from adaattn_cuda.arrays import ArrayView


class HostLibrary:
    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return np.full(shape, 7, np.float32 if dtype == "f32" else like.dtype)

    def stream(self, device: int) -> int:
        return 99

    def layout(self, array: Any) -> Any:
        return array.shape, array.strides, str(array.dtype)

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)


class Recorder:
    name = "a kernel"

    def __init__(self) -> None:
        self.started: list[tuple[tuple[int, ...], int, int]] = []

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        self.started.append((pointers, device, stream))


class FakeBackend:
    """Stands in for `CudaBackend`: hands out a recorder for every first run."""

    made: list[tuple[AttentionProblem, Plan, Recorder]]

    def run(self, problem: AttentionProblem, plan: Plan) -> Any:
        FakeBackend.made.append((problem, plan, Recorder()))
        rows = problem.query.shape[:3]
        raw = type("Raw", (), {})()
        raw.out = np.zeros((*rows, problem.dim_v), problem.query.dtype)
        raw.lse = np.zeros(rows, np.float32)
        return raw

    def last_launches(self) -> tuple[Recorder, ...]:
        return (FakeBackend.made[-1][2],)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    FakeBackend.made = []
    monkeypatch.setattr(forward, "CudaBackend", FakeBackend)
    monkeypatch.setattr(forward, "library_of", lambda array: HostLibrary())
    monkeypatch.setattr(forward, "view", lambda x: ArrayView(0, (), (), "f32", 3))
    forward._prepared.clear()
    yield
    forward._prepared.clear()


def arrays(dtype: Any = np.float32, len_q: int = 40) -> tuple[Any, Any, Any]:
    shapes = ((1, 2, len_q, 16), (1, 1, 50, 16), (1, 1, 50, 24))
    query, key, value = (np.zeros(shape, dtype) for shape in shapes)
    return query, key, value


def test_second_call_only_starts_the_launch() -> None:
    forward.attention_forward(*arrays())
    q, k, v = arrays()
    out, lse = forward.attention_forward(q, k, v)
    ((_, plan, launch),) = FakeBackend.made
    assert plan[0, 1].qk == plan[0, 1].pv == "f32"
    assert launch.started == [((*(x.ctypes.data for x in (q, k, v, out, lse)), 0, 0), 3, 99)]
    assert (out.shape, out.dtype) == ((1, 2, 40, 24), np.float32)
    assert (lse.shape, lse.dtype) == ((1, 2, 40), np.float32)


@pytest.mark.parametrize(
    ("other", "options"),
    [
        (arrays(len_q=41), {}),
        (arrays(np.float16), {}),
        (arrays(), {"scale": 2.0}),
        (arrays(), {"mask": Mask.causal("top_left")}),
        (arrays(), {"mask": Mask.key_lengths([7])}),
    ],
)
def test_whatever_changes_the_launch_makes_another(other: Any, options: Any) -> None:
    forward.attention_forward(*arrays())
    forward.attention_forward(*other, **options)
    assert len(FakeBackend.made) == 2
    problem = FakeBackend.made[-1][0]
    assert problem.scale == options.get("scale", 0.25)
    assert problem.mask.right == (0 if "mask" in options and not problem.mask.lengths else None)


def test_equal_masks_share_a_launch() -> None:
    for _ in range(3):
        forward.attention_forward(*arrays(), mask=Mask.causal("top_left"))
    assert len(FakeBackend.made) == 1


def test_array_masks_go_elsewhere() -> None:
    with pytest.raises(UnsupportedError, match="structural mask"):
        forward.attention_forward(*arrays(), mask=Mask.boolean(np.ones((40, 50), bool)))


def test_shapes_are_checked_on_the_first_call() -> None:
    q, k, v = arrays()
    with pytest.raises(ShapeError):
        forward.attention_forward(q, k, v[:, :, :3])
    assert not forward._prepared


def test_least_recently_used_layout_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_LAYOUTS_REMEMBERED", 2)
    for len_q in (1, 2, 1, 3, 1, 2):  # 2 is forgotten for 3, and made again
        forward.attention_forward(*arrays(len_q=len_q))
    assert len(FakeBackend.made) == 4
