"""Disk cache of compiled kernels: one folder per key, written aside and renamed into place.

A reader therefore sees a whole entry or none. Two processes that compile the same kernel both
succeed; the second finds the place taken and drops its copy. An entry whose cubin does not
match the hash in its ``spec.json`` is a miss and is replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn_cuda.jit.resources import Resources
from adaattn_cuda.jit.spec import KernelSpec

__all__ = ["SCHEMA", "CacheEntry", "DiskCache", "cache_key"]

SCHEMA = 1
"""Raise this when the layout of an entry or the meaning of a key changes."""

_CUBIN, _SOURCE, _SPEC = "kernel.cubin", "kernel.cu", "spec.json"


def cache_key(spec: KernelSpec, source: str, closure_digest: str, nvrtc: str) -> str:
    """Hex key over everything that decides the machine code.

    Parameters
    ----------
    spec : KernelSpec
    source : str
        The rendered unit.
    closure_digest : str
        Digest of the shipped sources that the unit includes.
    nvrtc : str
        Version of the compiler.
    """
    parts = (str(SCHEMA), nvrtc, spec.arch, *spec.options, source, closure_digest)
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """One compiled kernel on disk."""

    key: str
    path: Path
    name: str
    arch: str
    nvrtc: str
    resources: Resources
    seconds: float
    size_bytes: int

    def cubin(self) -> bytes:
        """Machine code."""
        return (self.path / _CUBIN).read_bytes()


class DiskCache:
    """The cache below one folder; see the module's text for what it promises."""

    def __init__(self, root: Path) -> None:
        self.root = root / f"v{SCHEMA}"

    def get(self, key: str) -> tuple[CacheEntry, bytes] | None:
        """Entry and machine code of ``key``, or None if it is missing or damaged."""
        folder = self._folder(key)
        try:
            facts = json.loads((folder / _SPEC).read_text(encoding="utf-8"))
            cubin = (folder / _CUBIN).read_bytes()
            if facts["sha256"] != hashlib.sha256(cubin).hexdigest():
                return None
            return self._entry(folder, facts), cubin
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(
        self,
        key: str,
        *,
        spec: KernelSpec,
        source: str,
        cubin: bytes,
        resources: Resources,
        seconds: float,
        nvrtc: str,
    ) -> None:
        """Store an entry; losing a race against another process is not an error."""
        facts = {
            "schema": SCHEMA,
            "name": spec.name,
            "spec": dataclasses.asdict(spec),
            "nvrtc": nvrtc,
            "resources": dataclasses.asdict(resources),
            "seconds": round(seconds, 3),
            "sha256": hashlib.sha256(cubin).hexdigest(),
        }
        folder = self._folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        try:
            (aside / _CUBIN).write_bytes(cubin)
            (aside / _SOURCE).write_text(source, encoding="utf-8")
            (aside / _SPEC).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            self._move_into_place(aside, folder, key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _move_into_place(self, aside: Path, folder: Path, key: str) -> None:
        try:
            os.rename(aside, folder)
        except OSError:
            if self.get(key) is not None:
                return  # another process was first, with a good entry
            shutil.rmtree(folder, ignore_errors=True)  # a damaged entry sits in the place
            try:
                os.rename(aside, folder)
            except OSError:
                if self.get(key) is None:
                    raise

    def entries(self) -> Iterator[CacheEntry]:
        """Every readable entry, by folder name."""
        for file in sorted(self.root.glob(f"*/*/{_SPEC}")):
            if file.parent.name.startswith("."):
                continue
            try:
                yield self._entry(file.parent, json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: a miss everywhere else, so not an entry here either

    def clear(self) -> int:
        """Remove every entry, damaged ones included; return how many there were."""
        count = sum(1 for folder in self.root.glob("*/*") if not folder.name.startswith("."))
        shutil.rmtree(self.root, ignore_errors=True)
        return count

    def _folder(self, key: str) -> Path:
        return self.root / key[:2] / key

    def _entry(self, folder: Path, facts: dict[str, Any]) -> CacheEntry:
        return CacheEntry(
            key=folder.name,
            path=folder,
            name=str(facts["name"]),
            arch=str(facts["spec"]["arch"]),
            nvrtc=str(facts["nvrtc"]),
            resources=Resources(**facts["resources"]),
            seconds=float(facts["seconds"]),
            size_bytes=(folder / _CUBIN).stat().st_size,
        )
