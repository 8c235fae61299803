"""Structures: parameters in range, of plain kinds, and back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from adaattn_core.errors import ArgumentError
from adaattn_core.structure import (
    STRUCTURES,
    BlockSparse,
    Landmark,
    block_mask,
    structure_from_json,
)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("score_skip", {"lam": 0.0}),
        ("score_skip", {"tile_q": 0}),
        ("low_rank", {"rank": 0}),
        ("block_sparse", {"tau": 1.0}),
        ("block_sparse", {"group": 100}),
        ("block_sparse", {"band": -1}),
        ("landmark", {"band": 100}),
        ("landmark", {"group": 1000}),
        ("landmark", {"screen_theta": 0.0}),
        ("landmark", {"samples": 0}),
        ("landmark", {"fitted": 1}),
    ],
)
def test_structures_check_their_ranges(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        STRUCTURES[kind](**fields)


def test_structures_round_trip_with_blocks() -> None:
    blocks = block_mask([[True, False, True], [False, False, False]])
    assert blocks == ((0, 2), ())
    structure = BlockSparse(blocks=blocks)
    assert structure_from_json(json.loads(json.dumps(structure.to_json()))) == structure


@pytest.mark.parametrize(
    "blocks",
    [((0, 0),), ((1, 0),), ((-1,),), ((2**31,),), ((2**63,),), ((0.0,),), (0,), 7, "ab"],
)
def test_blocks_are_increasing_whole_numbers(blocks: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        BlockSparse(tile_q=128, group=128, blocks=blocks)
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("array", [np.zeros(3, bool), np.zeros((2, 2)), [[0, 2]], [[]]])
def test_block_masks_are_boolean_matrices(array: Any) -> None:
    with pytest.raises(ArgumentError):
        block_mask(array)


def test_numbers_of_numpy_are_kept_as_plain_ones() -> None:
    structure = Landmark(tau=np.float32(0.25), band=np.int32(128))  # type: ignore[arg-type]
    assert (type(structure.tau), type(structure.band)) == (float, int)
    json.dumps(structure.to_json())
    blocks = BlockSparse(blocks=[[np.int64(0), np.uint8(3)]])  # type: ignore[arg-type]
    assert blocks.blocks == ((0, 3),)
    assert hash(blocks) == hash(BlockSparse(blocks=((0, 3),)))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 2**31, 2**200, math.nan, [1]])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (cls.kind, field.name)
        for cls in STRUCTURES.values()
        for field in dataclasses.fields(cls)
        if field.type == "int"
    ],
)
def test_sizes_of_structures_are_whole_and_in_range(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        STRUCTURES[kind](**{name: value})
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("value", [True, "0.5", None, math.nan, math.inf, 1.0, -0.1, 1j, [0.5]])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (cls.kind, field.name)
        for cls in STRUCTURES.values()
        for field in dataclasses.fields(cls)
        if field.type == "float"
    ],
)
def test_shares_of_structures_are_numbers_below_one(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ArgumentError):
        STRUCTURES[kind](**{name: value})
