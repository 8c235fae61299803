"""Compiles a unit of C++ that holds a kernel's own source, once a folder."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path

import adaattn_kernels_cu as kernels


def library(cxx: str, folder: Path, unit: str) -> ctypes.CDLL:
    """Compile a unit where the folder has not got it yet, and load it."""
    stem = folder / hashlib.sha256(unit.encode()).hexdigest()[:16]
    built = stem.with_suffix(".so")
    if not built.exists():
        source = stem.with_suffix(".cpp")
        source.write_text(unit)
        # The emulation shadows the shipped instruction headers: it must come first.
        paths = ["-I", str(Path(__file__).parent), "-I", str(kernels.root())]
        warnings = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *warnings]
        command = [cxx, *flags, *paths, str(source), "-o", str(built)]
        subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(built))
