"""Building a kernel: cache first, crashes survived, errors that say what to do."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

import adaattn_kernels_cu as kernels
from adaattn_core.errors import BackendUnavailableError, KernelCompileError
from adaattn_cuda.jit import compile as compiling
from adaattn_cuda.jit.cache import DiskCache
from adaattn_cuda.jit.compile import Compiler, build
from adaattn_cuda.jit.resources import Resources
from adaattn_cuda.jit.spec import KernelSpec

TINY = """\
// Budget: registers<=32 spill_bytes=0 smem_bytes<=64
#pragma once
namespace adaattn {
template <class T> constexpr int resident_blocks(int) { return 1; }
}
namespace adaattn::tiny {
struct Params { float* x; };
template <int kScale> struct Traits {
    static constexpr int kThreads = 32, kSmemBytes = 64, kFactor = kScale;
};
template <class T> __device__ void run(const Params& p) { p.x[threadIdx.x] *= T::kFactor; }
}
"""
LOG = (
    "ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 9 registers\n"
)

# A worker that answers by the file name's last word: what the real one does, and what it may
# do.
FAKE_WORKER = f"""
import json, os, signal, sys, time
for line in sys.stdin:
    request = json.loads(line)
    how = open(request["source_path"]).read()
    if "Traits<139>" in how:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "Traits<3>" in how:
        sys.exit(3)
    if "Traits<60>" in how:
        time.sleep(60)
    if "Traits<1>" in how:
        answer = {{"ok": False, "log": "kernel.cu(1): error: no", "seconds": 0.1}}
        print(json.dumps(answer), flush=True)
        continue
    open(request["cubin_path"], "wb").write(b"cubin")
    print(json.dumps({{"ok": True, "log": {LOG!r}, "seconds": 0.25}}), flush=True)
"""


def tiny(scale: int, arch: str = "sm_90a") -> KernelSpec:
    return KernelSpec("tiny", (scale,), 64, arch)


@pytest.fixture(autouse=True)
def _tiny_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sources" / "adaattn" / "attn"
    folder.mkdir(parents=True)
    (folder / "tiny.cuh").write_text(TINY)
    monkeypatch.setattr(kernels, "root", lambda: tmp_path / "sources")
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: "test")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the worker above in the real one's place; return its log of starts."""
    script = tmp_path / "worker.py"
    starts = tmp_path / "starts"
    script.write_text(f"open({str(starts)!r}, 'a').write('x')\n" + FAKE_WORKER)
    monkeypatch.setattr(compiling, "WORKER_COMMAND", (sys.executable, str(script)))
    return starts


def test_second_build_comes_from_the_cache_without_a_child(fake: Path) -> None:
    first, second = build(tiny(2)), build(tiny(2))
    assert (first.cached, second.cached) == (False, True)
    assert first.cubin == second.cubin == b"cubin"
    assert second.resources == Resources(9, 0, 0)
    assert fake.read_text() == "x"


@pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX matter")
def test_crash_costs_one_unit_and_keeps_its_source(fake: Path) -> None:
    with Compiler() as compiler:
        with pytest.raises(KernelCompileError, match="signal 11") as caught:
            compiler.compile(tiny(139))
        assert "Traits<139>" in caught.value.source_path.read_text()
        assert caught.value.spec == tiny(139)
        assert compiler.compile(tiny(2)).cubin == b"cubin"
    assert fake.read_text() == "xx", "the next unit gets a fresh child"


def test_exit_of_the_child_is_reported(fake: Path) -> None:
    with Compiler() as compiler, pytest.raises(KernelCompileError, match="exit code 3"):
        compiler.compile(tiny(3))


def test_hanging_compiler_is_ended(fake: Path) -> None:
    with (
        Compiler(limit_s=0.5) as compiler,
        pytest.raises(KernelCompileError, match="longer than"),
    ):
        compiler.compile(tiny(60))


def test_error_names_the_line_and_survives_pickling(fake: Path) -> None:
    with pytest.raises(KernelCompileError) as caught:
        build(tiny(1))
    error = caught.value
    assert "kernel.cu(1): error: no" in error.got
    assert str(error.source_path) in error.do
    assert pickle.loads(pickle.dumps(error)).source_path == error.source_path
    assert list(DiskCache(Path(os.environ["ADAATTN_CACHE_DIR"])).entries()) == []


def test_no_jit_raises_on_a_miss_and_allows_a_hit(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAATTN_NO_JIT", "1")
    with pytest.raises(KernelCompileError, match="ADAATTN_NO_JIT"):
        build(tiny(2))
    assert not fake.exists()
    monkeypatch.delenv("ADAATTN_NO_JIT")
    build(tiny(2))
    monkeypatch.setenv("ADAATTN_NO_JIT", "1")
    assert build(tiny(2)).cached


def test_compile_is_announced_with_seconds(
    fake: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny(2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "adaattn: compiling tiny<2> for sm_90a (first use)"
    assert lines[1].startswith("adaattn: compiled tiny<2> for sm_90a in ")
    assert lines[1].endswith(" s")
    build(tiny(2))
    monkeypatch.setenv("ADAATTN_QUIET", "1")
    build(tiny(4))
    assert capsys.readouterr().err == "", "neither a hit nor a quiet compile says anything"


def test_keep(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAATTN_KEEP", str(tmp_path / "kept"))
    build(tiny(2))
    kept = {path.suffix: path for path in (tmp_path / "kept").iterdir()}
    assert set(kept) == {".cu", ".cubin", ".log"}
    assert "Traits<2>" in kept[".cu"].read_text()


def test_unwritable_cache_says_what_to_set(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(blocked))
    with pytest.raises(BackendUnavailableError, match="set ADAATTN_CACHE_DIR"):
        build(tiny(2))


def test_a_changed_source_is_compiled_again(fake: Path, tmp_path: Path) -> None:
    build(tiny(2))
    header = tmp_path / "sources" / "adaattn" / "attn" / "tiny.cuh"
    header.write_text(header.read_text() + "// changed\n")
    assert not build(tiny(2)).cached


@pytest.mark.nvrtc
def test_real_compiler() -> None:
    built = build(tiny(2))
    assert built.cubin[:4] == b"\x7fELF"
    assert 0 < built.resources.registers <= 32
    assert built.resources.spill_bytes == 0


@pytest.mark.nvrtc
def test_wrong_smem_does_not_compile() -> None:
    with pytest.raises(KernelCompileError, match="host and kernel disagree"):
        build(KernelSpec("tiny", (2,), 65, "sm_90a"))


@pytest.mark.nvrtc
def test_unknown_architecture_says_what_to_install() -> None:
    with pytest.raises(KernelCompileError, match="install a newer NVRTC"):
        build(tiny(2, arch="sm_999"))
