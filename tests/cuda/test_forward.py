"""`attention_forward`: one launch per layout, found again by everything but the addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from adaattn_core.errors import AdaAttnError, ShapeError
from adaattn_core.mask import Mask
from adaattn_core.problem import AttentionProblem
from adaattn_cuda import dispatch, forward
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device import driver
from adaattn_cuda.device.views import ArrayView
from adaattn_cuda.recent import Recent


class HostLibrary:
    def outputs(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        assert (dtype == "f32") == (like.dtype == np.float32)
        out, lse = np.full(shape, 7, like.dtype), np.full(shape[:3], 7, np.float32)
        return out, lse, (out.ctypes.data, lse.ctypes.data)

    def stream(self, device: int) -> int:
        return 99

    def layout(self, array: Any) -> Any:
        return array.shape, array.strides, str(array.dtype)

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def inputs(self, *three: Any) -> Any:
        return tuple(map(self.pointer, three)), tuple(map(self.layout, three))


class Recorder:
    """Stands in for a launch; `made` are those that were asked for."""

    name = "a kernel"
    made: ClassVar[list[Recorder]] = []

    def __init__(
        self,
        problem: AttentionProblem,
        arrays: Any,
        formats: Any,
        heads: Any,
        stream: int,
        sinks: Any,
    ) -> None:
        self.problem, self.arrays, self.formats = problem, arrays, formats
        assert (sinks is None) == (problem.sinks is None)
        self.started: list[tuple[tuple[int, ...], int, int]] = []
        assert heads is None
        Recorder.made.append(self)

    def start(self, pointers: tuple[int, ...], device: int, stream: int) -> None:
        self.started.append((pointers, device, stream))


def host_view(x: Any) -> ArrayView:
    names = {"float32": "f32", "float16": "f16", "bool": "bool"}
    steps = tuple(s // x.dtype.itemsize for s in x.strides)
    return ArrayView(x.ctypes.data, x.shape, steps, names[str(x.dtype)], 3)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Recorder.made.clear()
    monkeypatch.setattr(forward, "make_launch", Recorder)
    monkeypatch.setattr(forward, "library_of", lambda array: HostLibrary())
    monkeypatch.setattr(forward, "view", host_view)
    monkeypatch.setattr(dispatch, "view", host_view)
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
    (launch,) = Recorder.made
    assert launch.formats == ("f32", "f32")
    last = ((*(x.ctypes.data for x in (q, k, v, out, lse)), 0, 0), 3, 99)
    assert launch.started[1:] == [last]
    assert len(launch.started) == 2
    assert (out.shape, out.dtype) == ((1, 2, 40, 24), np.float32)
    assert (lse.shape, lse.dtype) == ((1, 2, 40), np.float32)


def test_it_is_the_backends_cheap_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "load_driver", lambda: None)
    out, lse = CudaBackend().forward(*arrays(), mask=Mask.key_lengths([7]), scale=2.0)
    (launch,) = Recorder.made
    assert launch.problem.mask.lengths == (7,)
    assert launch.problem.scale == 2.0
    assert (out.shape, lse.shape) == ((1, 2, 40, 24), (1, 2, 40))


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
    assert len(Recorder.made) == 2
    problem = Recorder.made[-1].problem
    assert problem.scale == options.get("scale", 0.25)
    assert problem.mask.right == (0 if "mask" in options and not problem.mask.lengths else None)


def test_equal_masks_share_a_launch() -> None:
    for _ in range(3):
        forward.attention_forward(*arrays(), mask=Mask.causal("top_left"))
    assert len(Recorder.made) == 1


def test_array_masks_are_known_by_layout_and_passed_by_address() -> None:
    bias = np.zeros((2, 40, 50), np.float32)
    for allowed in (np.ones((40, 50), bool), np.zeros((40, 50), bool)):
        mask = Mask.boolean(allowed) & Mask.additive(bias) & Mask.causal("top_left")
        forward.attention_forward(*arrays(), mask=mask)
        pointers, _, _ = Recorder.made[0].started[-1]
        assert pointers[5:] == (allowed.ctypes.data, bias.ctypes.data)
    (launch,) = Recorder.made
    assert launch.arrays[5].strides == (0, 0, 50, 1)
    assert launch.arrays[6].strides == (0, 2000, 50, 1)
    forward.attention_forward(*arrays(), mask=Mask.additive(bias[:1]))
    forward.attention_forward(*arrays(), mask=Mask.additive(bias[:, :1]))
    forward.attention_forward(*arrays(), mask=Mask.boolean(np.ones((40, 50), bool)))
    assert len(Recorder.made) == 4


def test_a_mask_of_another_library_is_checked_every_time() -> None:
    class Foreign(np.ndarray):
        pass

    mask = Mask.boolean(np.ones((40, 50), bool).view(Foreign))
    for _ in range(2):
        forward.attention_forward(*arrays(), mask=mask)
    assert len(Recorder.made) == 2
    assert len(forward._prepared) == 0


def test_arrays_of_different_types_are_checked_every_time() -> None:
    q, k, v = arrays()
    with pytest.raises(AdaAttnError):
        forward.attention_forward(q, k.tolist(), v)
    assert len(forward._prepared) == 0


def test_shapes_are_checked_on_the_first_call() -> None:
    q, k, v = arrays()
    with pytest.raises(ShapeError):
        forward.attention_forward(q, k, v[:, :, :3])
    assert len(forward._prepared) == 0


def test_least_recently_used_layout_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_prepared", Recent(2))
    for len_q in (1, 2, 1, 3, 1, 2):  # 2 is forgotten for 3, and made again
        forward.attention_forward(*arrays(len_q=len_q))
    assert len(Recorder.made) == 4


def test_softcap_and_sinks_belong_to_the_launch() -> None:
    """One launch for each rule; sinks go by address, behind the masks'."""
    q, k, v = (np.zeros((1, 2, 16, 16), np.float32) for _ in range(3))
    first, second = np.zeros(2, np.float32), np.zeros(2, np.float32)
    asked: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"softcap": 3.0}, {"sinks": first}]
    for rules in (*asked, {"sinks": second}, *asked):
        forward.attention_forward(q, k, v, **rules)
    assert [launch.problem.softcap for launch in Recorder.made] == [None, 2.0, 3.0, None]
    where = [pointers[7:] for pointers, _, _ in Recorder.made[3].started]
    assert where == [(first.ctypes.data,), (second.ctypes.data,), (first.ctypes.data,)]
    assert all(len(pointers) == 7 for pointers, _, _ in Recorder.made[0].started)
