"""Clusters of like queries: what they partition, and what they bring together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import AttentionProblem
from adaattn_reference.clusters import LEAST_ROWS, query_clusters
from adaattn_reference.view import ProblemViews


def view_of(query, key):
    q, k = query[None, None], key[None, None]
    return ProblemViews(AttentionProblem.from_arrays(q, k, k))[0, 0]


def random_view(seed, rows, dim=16):
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((2, rows, dim), dtype=np.float32)
    return view_of(query, key)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.sampled_from([1, 2, 4, 8]))
def test_every_row_belongs_to_one_cluster(seed, rows, count):
    groups = [slice(a, min(a + 256, rows)) for a in range(0, rows, 256)]
    clusters = query_clusters(random_view(seed, rows), groups, count)
    for group, parts in zip(groups, clusters, strict=True):
        together = np.sort(np.concatenate(parts))
        assert np.array_equal(together, np.arange(group.start, group.stop))
        sizes = [len(part) for part in parts]
        assert len(parts) <= count
        assert max(sizes) - min(sizes) < len(parts)
        assert len(parts) == 1 or min(sizes) >= LEAST_ROWS


def test_like_queries_come_together():
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(4), 64))
    centres = 5 * np.linalg.qr(rng.standard_normal((16, 4)))[0].T
    query = centres[kinds] + 0.1 * rng.standard_normal((256, 16))
    key = rng.standard_normal((256, 16))
    view = view_of(query.astype(np.float32), key.astype(np.float32))
    (parts,) = query_clusters(view, [slice(0, 256)], 4)
    assert [len(np.unique(kinds[part])) for part in parts] == [1, 1, 1, 1]


def test_directions_without_spread_of_keys_do_not_count():
    """Two queries that differ only where all keys agree have the same softmax."""
    rng = np.random.default_rng(1)
    matters, loud = rng.permutation(np.repeat([-1.0, 1.0], 64)), rng.standard_normal(128)
    query = np.stack([matters, 100 * loud], axis=1).astype(np.float32)
    key = np.stack([rng.standard_normal(128), np.ones(128)], axis=1).astype(np.float32)
    (parts,) = query_clusters(view_of(query, key), [slice(0, 128)], 2)
    assert [len(np.unique(matters[part])) for part in parts] == [1, 1]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e-30, 1e30])
def test_odd_queries_are_still_partitioned(value):
    query = np.full((128, 16), value, np.float32)
    key = np.random.default_rng(0).standard_normal((128, 16), dtype=np.float32)
    with np.errstate(all="ignore"):
        (parts,) = query_clusters(view_of(query, key), [slice(0, 128)], 4)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(128))
