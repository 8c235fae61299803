"""Errors: one base, standard parents, three lines, facts that survive pickling."""

from __future__ import annotations

import inspect
import pickle

import pytest

from adaattn_core import errors
from adaattn_core.errors import AdaAttnError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, AdaAttnError)]


@pytest.mark.parametrize("cls", ALL)
def test_message_has_three_lines(cls: type[AdaAttnError]) -> None:
    error = cls(got="a", needed="b", do="c")
    assert str(error) == "got: a\nneeded: b\ndo this: c"


@pytest.mark.parametrize("cls", [c for c in ALL if c is not AdaAttnError])
def test_each_is_also_a_standard_error(cls: type[AdaAttnError]) -> None:
    standard = [b for b in cls.__mro__ if b.__module__ == "builtins"]
    assert standard[0] not in (Exception, BaseException, object)


@pytest.mark.parametrize("cls", ALL)
def test_facts_are_attributes_and_survive_pickling(cls: type[AdaAttnError]) -> None:
    error = cls(got="a", needed="b", do="c", reason="r", number=3)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert (copy.reason, copy.number, copy.facts) == ("r", 3, {"reason": "r", "number": 3})
