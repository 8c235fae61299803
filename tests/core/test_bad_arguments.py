"""Arguments of the wrong kind or out of range: three lines, never a bare exception."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaattn_core import ErrorBudget, Mask, attention, get_backend
from adaattn_core.arrays import array_device
from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    BackendUnavailableError,
    DTypeError,
    PlanError,
    ShapeError,
    UnsupportedError,
)
from adaattn_core.plan import Plan
from adaattn_core.policies import BudgetPolicy, CalibratedPolicy, EntropyPolicy, FixedPolicy
from adaattn_core.structure import Dense

X = np.random.default_rng(0).standard_normal((1, 1, 8, 16), dtype=np.float32)


def is_three_lines(error: AdaAttnError) -> bool:
    heads = [line.split(":")[0] for line in str(error).split("\n")]
    return heads == ["got", "needed", "do this"]


JUNK: tuple[Any, ...] = (
    True,
    np.True_,
    "0.1",
    "x",
    b"x",
    1.5,
    -1,
    float("nan"),
    10**400,
    1j,
    (),
    [1],
    {},
    object(),
    int,
    np.ones(3),
    torch.ones(2),
    threading.Lock(),
)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("mask", ()),
        ("scale", (1.5, 10**400)),
        ("budget", (1.5,)),
        ("policy", ()),
        ("plan", ()),
        ("backend", ()),
        ("target", ()),
        ("layout", ()),
        ("seed", ()),
        ("layer", ("0.1", "x")),
    ],
)
def test_every_argument_refuses_junk(name: str, valid: tuple[Any, ...]) -> None:
    for junk in JUNK:
        if any(junk is good or (type(junk) is type(good) and junk == good) for good in valid):
            continue
        with pytest.raises((ArgumentError, BackendUnavailableError)) as refusal:
            attention(X, X, X, **{name: junk})
        assert is_three_lines(refusal.value), junk


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("junk", [*JUNK, None, X.tolist()], ids=lambda x: type(x).__name__)
def test_what_is_no_array_is_refused(position: int, junk: Any) -> None:
    arrays = [X, X, X]
    arrays[position] = junk
    with pytest.raises((DTypeError, ShapeError)) as refusal:
        attention(*arrays)
    assert is_three_lines(refusal.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ErrorBudget(True),
        lambda: ErrorBudget("0.1"),  # type: ignore[arg-type]
        lambda: ErrorBudget(0.1, rows=True),
        lambda: ErrorBudget(0.1, confidence=np.ones(2)),  # type: ignore[arg-type]
        lambda: ErrorBudget(0.1, guarantee=np.ones(2)),  # type: ignore[arg-type]
        lambda: ErrorBudget(0.1, on_violation=None),  # type: ignore[arg-type]
        lambda: Mask.key_lengths(5),  # type: ignore[arg-type]
        lambda: Mask.key_lengths([True]),
        lambda: Mask.key_lengths([1.5]),  # type: ignore[list-item]
        lambda: Mask.key_lengths(np.ones((2, 2), int)),  # type: ignore[arg-type]
        lambda: Mask.ragged(5, [0, 1]),  # type: ignore[arg-type]
        lambda: Mask.sliding_window(True),
        lambda: Mask.sliding_window(2.0),  # type: ignore[arg-type]
        lambda: Mask.causal(5),  # type: ignore[arg-type]
        lambda: Mask.causal(np.ones(2)),  # type: ignore[arg-type]
        lambda: Mask.causal() & np.ones((8, 8), bool),
        lambda: EntropyPolicy(score_8bit="a"),  # type: ignore[arg-type]
        lambda: EntropyPolicy(least_len=1.5),  # type: ignore[arg-type]
        lambda: BudgetPolicy(taus=0.1),  # type: ignore[arg-type]
        lambda: BudgetPolicy(lams=(0.1, 2.0)),
        lambda: BudgetPolicy(margin=float("nan")),
        lambda: CalibratedPolicy(5),  # type: ignore[arg-type]
        lambda: Plan.load(5),  # type: ignore[arg-type]
        lambda: FixedPolicy().plan and Plan({(0, 0): FixedPolicy().plan}).save(5),  # type: ignore[arg-type]
        lambda: get_backend(5),  # type: ignore[arg-type]
    ],
)
def test_constructors_refuse_junk(make: Any) -> None:
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert is_three_lines(refusal.value)


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), np.array(0.1)])
def test_numbers_of_other_libraries_are_numbers(number: Any) -> None:
    expected = attention(X, X, X, budget=float(number), scale=float(number), seed=3)
    for budget in (number, ErrorBudget(number), torch.tensor(float(number))):
        result = attention(X, X, X, budget=budget, scale=number, seed=np.int64(3))
        np.testing.assert_array_equal(result.out, expected.out)
    assert type(ErrorBudget(number, rows=np.float32(0.5)).rows) is float


def test_no_lengths_are_not_every_length() -> None:
    with pytest.raises(ShapeError, match="key lengths"):
        attention(X, X, X, mask=Mask.key_lengths([]))
    empty = X[:0]
    assert attention(empty, empty, empty, mask=Mask.key_lengths([])).out.shape == empty.shape


@pytest.mark.parametrize("wrap", [Mask.boolean, Mask.additive])
def test_masked_arrays_do_not_lose_their_mask(wrap: Any) -> None:
    hidden = np.ma.masked_array(X, X > 0)
    for position in range(3):
        arrays = [X, X, X]
        arrays[position] = hidden
        with pytest.raises(DTypeError, match="masked array"):
            attention(*arrays)
    dtype = bool if wrap == Mask.boolean else np.float32
    mask = np.ma.masked_array(np.zeros((8, 8), dtype), np.eye(8, dtype=bool))
    with pytest.raises(DTypeError, match="masked array"):
        attention(X, X, X, mask=wrap(mask))


@pytest.mark.parametrize("dtype", [">f4", complex, object, "U3", "M8[s]", np.int32, bool])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    x = np.zeros((1, 1, 8, 16)).astype(dtype)
    with pytest.raises(DTypeError) as refusal:
        attention(x, x, x)
    assert is_three_lines(refusal.value)


def test_tensors_without_plain_memory_are_refused() -> None:
    sparse = torch.ones(1, 1, 8, 16).to_sparse()
    with pytest.raises(UnsupportedError, match="strided"):
        attention(sparse, sparse, sparse)

    class Impostor:
        shape, dtype, ndim = (1, 1, 8, 16), np.dtype(np.float32), 4

    with pytest.raises(DTypeError, match="Impostor"):
        array_device(Impostor())
    with pytest.raises(DTypeError):
        attention(Impostor(), Impostor(), Impostor())


LAYERS = ("../x", "/etc/x", "a/b", "..", ".", ".hidden", "a\\b", "a\0b", "model.layers.0", "é")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_name_stays_in_its_folder(tmp_path: Path, layer: str) -> None:
    folder = tmp_path / "outer" / "plans"
    folder.mkdir(parents=True)
    plan = Plan({(0, 0): FixedPolicy(Dense()).plan})
    CalibratedPolicy(plans={layer: plan, "other": plan}).save(folder)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert all(path.parent == folder for path in files)
    assert set(CalibratedPolicy(folder).plans) == {layer, "other"}


@pytest.mark.parametrize("layers", [("", "plan"), ("a", "A")])
def test_two_layers_never_share_a_file(tmp_path: Path, layers: tuple[str, ...]) -> None:
    plan = Plan({(0, 0): FixedPolicy(Dense()).plan})
    with pytest.raises(PlanError, match="upper and lower case"):
        CalibratedPolicy(plans=dict.fromkeys(layers, plan)).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_message_is_three_lines_whatever_it_quotes() -> None:
    error = ArgumentError(got="a\x1b[31m\nneeded: b", needed="\u202ex\x00", do="\ud800 é")
    assert str(error) == (
        "got: a\\x1b[31m needed: b\nneeded: \\u202ex\\x00\ndo this: \\ud800 é"
    )
    assert error.got == "a\x1b[31m\nneeded: b"
