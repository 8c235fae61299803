"""Reading and writing Q/K/V files: every format, and every way in which a file can be wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaattn_core.cli.inputs import read_inputs
from adaattn_core.cli.outputs import check_array_output, write_output
from adaattn_core.errors import AdaAttnError, DTypeError, FileError, ShapeError

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((2, 4, 7, 8), dtype=np.float32),
        "k": rng.standard_normal((2, 2, 9, 8), dtype=np.float32),
        "v": rng.standard_normal((2, 2, 9, 5), dtype=np.float32),
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_come_back_as_they_were_saved(
    tmp_path: Path, arrays: Arrays, dtype: str, suffix: str
) -> None:
    path = tmp_path / f"layer{suffix}"
    saved = {name: x.astype(dtype) for name, x in arrays.items()}
    if suffix == ".npz":
        np.savez(path, **saved, scale=0.25)
    else:
        save_file({**saved, "scale": np.array([0.25], np.float32)}, path)
    inputs = read_inputs(path)
    for name, read in zip("qkv", (inputs.query, inputs.key, inputs.value), strict=True):
        assert read.dtype == saved[name].dtype
        assert np.array_equal(read, saved[name])
    assert inputs.scale == 0.25
    assert inputs.batched


def test_three_axes_get_a_batch_axis(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "layer.npz"
    np.savez(path, **{name: x[0] for name, x in arrays.items()})
    inputs = read_inputs(path)
    assert inputs.query.shape == (1, 4, 7, 8)
    assert not inputs.batched
    assert inputs.scale is None


def test_bf16_bits_in_npz(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "layer.npz"
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    bits: dict[str, Any] = {name: x.view(np.uint16) for name, x in rounded.items()}
    np.savez(path, **bits, dtype="bfloat16")
    assert np.array_equal(read_inputs(path).query, rounded["q"])
    assert read_inputs(path).query.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_output_can_be_read_again(tmp_path: Path, suffix: str, dtype: Any) -> None:
    """Output has the form of what `run` reads: bf16 survives the round trip."""
    path = tmp_path / f"out{suffix}"
    out = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(dtype)
    lse = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_output(path, out, lse)
    if suffix == ".npz":
        with np.load(path) as back:
            read, read_lse = back["out"], back["lse"]
            if dtype is ml_dtypes.bfloat16:
                assert back["dtype"] == "bfloat16"
                read = read.view(ml_dtypes.bfloat16)
    else:
        tensors = load_file(path)
        read, read_lse = tensors["out"], tensors["lse"]
    assert read.dtype == out.dtype
    assert np.array_equal(read, out)
    assert np.array_equal(read_lse, lse)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_bf16_safetensors_is_read(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "layer.safetensors"
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    save_file(rounded, path)
    inputs = read_inputs(path)
    assert inputs.key.dtype == ml_dtypes.bfloat16
    assert np.array_equal(inputs.key, rounded["k"])


# -- what can be wrong ------------------------------------------------------------------------
def wrong_files(folder: Path, arrays: Arrays) -> dict[str, tuple[Path, type[AdaAttnError]]]:
    """One file for every way to be wrong, and the error that it must end in."""
    a = arrays
    cases: dict[str, tuple[Path, type[AdaAttnError]]] = {}

    def npz(name: str, error: type[AdaAttnError], **entries: Any) -> None:
        path = folder / f"{name}.npz"
        np.savez(path, **entries)
        cases[name] = path, error

    def raw(name: str, error: type[AdaAttnError], data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        cases[name] = path, error

    npz("no_v", FileError, q=a["q"], k=a["k"])
    npz("empty_archive", FileError)
    npz("objects", FileError, q=np.array([{}], object), k=a["k"], v=a["v"])
    npz("integers", DTypeError, **{n: x.astype(np.int32) for n, x in a.items()})
    npz("complex", DTypeError, **{n: x.astype(np.complex64) for n, x in a.items()})
    npz("long_double", DTypeError, **{n: x.astype(np.longdouble) for n, x in a.items()})
    npz("undeclared_bits", DTypeError, **{n: x.astype(np.uint16) for n, x in a.items()})
    npz("wrong_declaration", DTypeError, **a, dtype="float16")
    npz("declared_bf16_but_f32", DTypeError, **a, dtype="bfloat16")
    npz("two_axes", ShapeError, q=a["q"][0, 0], k=a["k"], v=a["v"])
    npz("five_axes", ShapeError, q=a["q"][None], k=a["k"], v=a["v"])
    npz("mixed_axes", ShapeError, q=a["q"], k=a["k"][0], v=a["v"])
    npz("two_scales", ShapeError, **a, scale=[1.0, 2.0])
    npz("word_scale", ShapeError, **a, scale="big")
    np.savez(folder / "whole.npz", **a)
    whole = (folder / "whole.npz").read_bytes()
    raw("cut.npz", FileError, whole[: len(whole) // 2])
    raw("damaged.npz", FileError, whole[:200] + bytes(200) + whole[400:])
    raw("text.npz", FileError, b"not an archive")
    raw("nothing.npz", FileError, b"")
    raw("zip_of_text.npz", FileError, _zip_of_text(folder))
    np.save(folder / "single.npy", a["q"])
    raw("single.npz", FileError, (folder / "single.npy").read_bytes())
    cases["npy"] = folder / "single.npy", FileError
    cases["missing"] = folder / "missing.npz", FileError
    cases["folder"] = folder / "folder.npz", FileError
    cases["folder"][0].mkdir()
    raw("text.safetensors", FileError, b"not a safetensors file")
    raw("nothing.safetensors", FileError, b"")
    save_file(a, folder / "fine.safetensors")
    raw("cut.safetensors", FileError, (folder / "fine.safetensors").read_bytes()[:-4])
    save_file({"q": a["q"]}, folder / "only_q.safetensors")
    cases["only_q"] = folder / "only_q.safetensors", FileError
    save_file({n: x.astype(np.int8) for n, x in a.items()}, folder / "int8.safetensors")
    cases["int8"] = folder / "int8.safetensors", DTypeError
    return cases


def _zip_of_text(folder: Path) -> bytes:
    path = folder / "text.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", "not an array")
    return path.read_bytes()


@pytest.mark.parametrize("case", list(range(28)))
def test_every_wrong_file_is_refused_with_three_lines(
    tmp_path: Path, arrays: Arrays, case: int
) -> None:
    cases = wrong_files(tmp_path, arrays)
    assert len(cases) == 28
    path, error = list(cases.values())[case]
    with pytest.raises(error) as refused:
        read_inputs(path)
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["got", "needed", "do this"]


def test_outputs_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    for path in (
        tmp_path / "out.txt",
        tmp_path / "out",
        tmp_path / "no" / "such" / "out.npz",
        tmp_path / "folder.npz",
    ):
        with pytest.raises(FileError):
            check_array_output(path)
    check_array_output(tmp_path / "out.npz")
