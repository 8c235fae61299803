"""KernelSpec -> machine code: from the disk cache, else from a compiler in a child process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import adaattn_kernels_cu as kernels
from adaattn_core.errors import BackendUnavailableError, KernelCompileError
from adaattn_cuda import environment
from adaattn_cuda.jit.cache import DiskCache, cache_key
from adaattn_cuda.jit.codegen import render
from adaattn_cuda.jit.resources import Resources, parse_log
from adaattn_cuda.jit.spec import KernelSpec
from adaattn_cuda.jit.toolchain import INSTALL_HINT, nvrtc_version

__all__ = ["Built", "Compiler", "build"]

WORKER_COMMAND: tuple[str, ...] = (sys.executable, "-m", "adaattn_cuda.jit.worker")
COMPILE_LIMIT_S = 300.0
"""A unit takes seconds; a compiler that needs longer than this hangs."""


@dataclass(frozen=True)
class Built:
    """Machine code of one kernel and how it came about.

    Attributes
    ----------
    cubin : bytes
    resources : Resources
    seconds : float
        Time that the compiler took, whenever that was.
    cached : bool
        Whether it came from the disk cache.
    """

    spec: KernelSpec
    cubin: bytes
    resources: Resources
    seconds: float
    cached: bool


class Compiler:
    """A compiling child process, started with the first unit and ended by `close`.

    A child that dies or hangs costs the unit at hand a `KernelCompileError`; the next unit gets
    a fresh child. Use it as a context manager.
    """

    def __init__(
        self, command: Sequence[str] | None = None, limit_s: float = COMPILE_LIMIT_S
    ) -> None:
        self._command = tuple(command or WORKER_COMMAND)
        self._limit_s = limit_s
        self._child: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="adaattn-compile-"))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child and remove the scratch folder."""
        if self._child is not None:
            assert self._child.stdin is not None
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            try:
                self._child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._child.kill()
            self._drop_child()
        shutil.rmtree(self._folder, ignore_errors=True)

    def compile(self, spec: KernelSpec) -> Built:
        """Compile one specialisation, without looking at the cache.

        Raises
        ------
        KernelCompileError
            If the compiler reports an error, dies or hangs; `source_path` keeps the source.
        """
        source = render(spec)
        unit, cubin_path = self._folder / "kernel.cu", self._folder / "kernel.cubin"
        unit.write_text(source, encoding="utf-8")
        cubin_path.unlink(missing_ok=True)
        request = {
            "source_path": str(unit),
            "cubin_path": str(cubin_path),
            "arch": spec.arch,
            "include_path": str(kernels.root()),
            "options": list(spec.options),
        }
        answer = self._ask(request)
        if not answer["ok"]:
            raise _failure(spec, source, answer["log"])
        cubin = cubin_path.read_bytes()
        _keep(spec, source, cubin, answer["log"])
        return Built(spec, cubin, parse_log(answer["log"]), float(answer["seconds"]), False)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._start_child()
        assert child.stdin is not None
        assert child.stdout is not None
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        stdout = child.stdout
        # A thread reads, because a pipe cannot be read with a time limit on every platform.
        threading.Thread(target=lambda: answers.put(stdout.readline()), daemon=True).start()
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = answers.get(timeout=self._limit_s)
        except queue.Empty:
            child.kill()
            self._drop_child()
            return {"ok": False, "log": f"the compiler ran longer than {self._limit_s:.0f} s"}
        except OSError:
            line = ""  # the child died before it read the request
        if line:
            return dict(json.loads(line))
        code = child.wait()
        self._drop_child()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"ok": False, "log": f"the compiling process died ({how})"}

    def _start_child(self) -> subprocess.Popen[str]:
        if self._child is None:
            # The child must find these packages wherever the parent found them.
            paths = [str(Path(__file__).parents[2]), str(kernels.root().parent)]
            old = os.environ.get("PYTHONPATH")
            env = os.environ | {"PYTHONPATH": os.pathsep.join(paths + ([old] if old else []))}
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=env,
            )
        return self._child

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._child = None


def build(
    spec: KernelSpec, *, cache: DiskCache | None = None, compiler: Compiler | None = None
) -> Built:
    """Machine code of ``spec``: from the cache, else compiled, announced and stored.

    Parameters
    ----------
    spec : KernelSpec
    cache : DiskCache, optional
        Default: the one at ``ADAATTN_CACHE_DIR``.
    compiler : Compiler, optional
        A running one; default: a child for this unit alone, started on a miss only.

    Raises
    ------
    KernelCompileError
        If it does not compile, or ``ADAATTN_NO_JIT`` forbids compiling it.
    BackendUnavailableError
        If NVRTC is not installed, or the cache's folder cannot be written.
    """
    cache = cache or DiskCache(environment.cache_dir())
    source = render(spec)
    nvrtc = nvrtc_version()
    key = cache_key(spec, source, kernels.digest(spec.header), nvrtc)
    hit = cache.get(key)
    if hit is not None:
        entry, cubin = hit
        return Built(spec, cubin, entry.resources, entry.seconds, True)
    if environment.no_jit():
        raise KernelCompileError(
            got=f"{spec.name} for {spec.arch} is not in the cache at {cache.root}",
            needed="a cached kernel, because ADAATTN_NO_JIT forbids compiling",
            do="run `adaattn warmup` with ADAATTN_NO_JIT unset, or unset it here",
            spec=spec,
            log="",
            source_path=None,
        )
    with _announced(spec), contextlib.ExitStack() as stack:
        built = (compiler or stack.enter_context(Compiler())).compile(spec)
    try:
        cache.put(
            key,
            spec=spec,
            source=source,
            cubin=built.cubin,
            resources=built.resources,
            seconds=built.seconds,
            nvrtc=nvrtc,
        )
    except OSError as error:
        raise BackendUnavailableError(
            got=f"the kernel cache {cache.root} cannot be written ({error})",
            needed="a folder that this user can write",
            do="set ADAATTN_CACHE_DIR to one",
            reason="the kernel cache cannot be written",
        ) from error
    return built


@contextlib.contextmanager
def _announced(spec: KernelSpec) -> Iterator[None]:
    """Say on stderr that a compile is under way, and how long it took."""
    if environment.quiet():
        yield
        return
    what = f"{spec.name} for {spec.arch}"
    started = time.perf_counter()
    _say(f"compiling {what} (first use)")
    try:
        yield
    except KernelCompileError:
        _say(f"gave up on {what} after {time.perf_counter() - started:.1f} s")
        raise
    _say(f"compiled {what} in {time.perf_counter() - started:.1f} s")


def _say(text: str) -> None:
    # One write per line: several compilers may report at the same time.
    sys.stderr.write(f"adaattn: {text}\n")
    sys.stderr.flush()


def _failure(spec: KernelSpec, source: str, log: str) -> KernelCompileError:
    folder = environment.keep_dir() or Path(tempfile.mkdtemp(prefix="adaattn-failed-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_file_stem(spec, source)}.cu"
    path.write_text(source, encoding="utf-8")
    path.with_suffix(".log").write_text(log, encoding="utf-8")
    if "invalid value for --gpu-architecture" in log:
        do = f"install a newer NVRTC: this one does not know {spec.arch} ({INSTALL_HINT})"
    elif "No module named" in log or "DynamicLibNotFound" in log:
        do = INSTALL_HINT
    else:
        do = f"report it with the source and log kept at {path}"
    return KernelCompileError(
        got=f"{spec.name} for {spec.arch}: {_first_error(log)}",
        needed="a unit that NVRTC compiles",
        do=do,
        spec=spec,
        log=log,
        source_path=path,
    )


def _first_error(log: str) -> str:
    """Return the line of a compiler's log that names the first error, else its first line."""
    lines = [line.strip() for line in log.replace("\0", "").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), (lines or ["no message"])[0])


def _keep(spec: KernelSpec, source: str, cubin: bytes, log: str) -> None:
    folder = environment.keep_dir()
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = _file_stem(spec, source)
    (folder / f"{stem}.cu").write_text(source, encoding="utf-8")
    (folder / f"{stem}.cubin").write_bytes(cubin)
    (folder / f"{stem}.log").write_text(log, encoding="utf-8")


def _file_stem(spec: KernelSpec, source: str) -> str:
    """Readable and distinct: stem, arch, and a digest of the unit."""
    return f"{spec.stem}.{spec.arch}.{cache_key(spec, source, '', '')[:12]}"
