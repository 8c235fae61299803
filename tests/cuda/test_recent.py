"""What was used lately stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaattn_cuda.recent import Recent


def test_the_oldest_unread_value_is_forgotten() -> None:
    recent: Recent[object] = Recent(limit=2)
    made = []
    for key in ("a", "b", "a", "c", "a", "b"):
        if recent.get(key) is None:
            made.append(key)
            recent.put(key, object())
    assert made == ["a", "b", "c", "b"]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 5))
def test_never_too_many_and_never_another_value(keys: list[int], limit: int) -> None:
    recent: Recent[int] = Recent(limit)
    for key in keys:
        found = recent.get(key)
        assert found in (None, 10 * key)
        recent.put(key, 10 * key)
        assert recent.get(key) == 10 * key, "the newest is there"
        assert len(recent) <= limit
