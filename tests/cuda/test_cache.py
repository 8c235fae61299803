"""The disk cache: whole entries or none, whoever else writes, and whatever is damaged."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from pathlib import Path

import pytest

from adaattn_cuda.jit.cache import DiskCache, cache_key
from adaattn_cuda.jit.resources import Resources
from adaattn_cuda.jit.spec import KernelSpec

SPEC = KernelSpec("example", (1, True), 128, "sm_90a")
RESOURCES = Resources(registers=12, spill_bytes=0, stack_bytes=0)
KEY = cache_key(SPEC, "source", "digest", "13.5")


def store(cache: DiskCache, cubin: bytes = b"cubin", key: str = KEY) -> None:
    facts = {"resources": RESOURCES, "seconds": 1.5, "nvrtc": "13.5"}
    cache.put(key, spec=SPEC, source="source", cubin=cubin, **facts)


def test_round_trip(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    assert cache.get(KEY) is None
    store(cache)
    entry, cubin = cache.get(KEY)
    assert cubin == b"cubin" == entry.cubin()
    assert (entry.resources, entry.seconds, entry.nvrtc) == (RESOURCES, 1.5, "13.5")
    assert [e.key for e in cache.entries()] == [KEY]
    assert (entry.path / "kernel.cu").read_text() == "source"


def test_key_depends_on_everything_that_decides_the_code() -> None:
    keys = {
        KEY,
        cache_key(SPEC, "other", "digest", "13.5"),
        cache_key(SPEC, "source", "other", "13.5"),
        cache_key(SPEC, "source", "digest", "13.0"),
        cache_key(dataclasses.replace(SPEC, arch="sm_80"), "source", "digest", "13.5"),
        cache_key(dataclasses.replace(SPEC, options=("-O1",)), "source", "digest", "13.5"),
    }
    assert len(keys) == 6


@pytest.mark.parametrize("name", ["kernel.cubin", "spec.json"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"garbage"])
def test_damaged_entry_is_a_miss_and_is_replaced(
    tmp_path: Path, name: str, damage: bytes
) -> None:
    cache = DiskCache(tmp_path)
    store(cache)
    (cache.get(KEY)[0].path / name).write_bytes(damage)
    assert cache.get(KEY) is None
    store(cache, b"again")
    assert cache.get(KEY)[1] == b"again"


def test_half_an_entry_is_a_miss(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    store(cache)
    (cache.get(KEY)[0].path / "kernel.cubin").unlink()
    assert cache.get(KEY) is None
    assert list(cache.entries()) == []


def test_losing_a_race_keeps_the_first_entry(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    store(cache, b"first")
    store(cache, b"second")
    assert cache.get(KEY)[1] == b"first"


def test_many_writers_and_readers(tmp_path: Path) -> None:
    """Whoever reads sees nothing or a whole entry; nothing is left lying beside it."""
    cache = DiskCache(tmp_path)
    cubin = bytes(range(256)) * 4096

    def work(i: int) -> bool:
        if i % 2:
            store(cache, cubin)
            return True
        hit = cache.get(KEY)
        return hit is None or hit[1] == cubin

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
    assert [p.name for p in cache.root.glob("*/*")] == [KEY]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path)

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            store(cache)
    assert cache.get(KEY) is None
    assert list(cache.root.glob("*/*")) == []


def test_clear(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    for i in range(3):
        store(cache, key=cache_key(SPEC, str(i), "digest", "13.5"))
    assert cache.clear() == 3
    assert list(cache.entries()) == []
    assert cache.clear() == 0
