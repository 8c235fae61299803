"""Discovery: plugins come by entry point, one by one, and a broken one harms nobody else."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from adaattn_core import registry as registry_module
from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    BackendUnavailableError,
    PluginError,
    UnsupportedError,
)
from adaattn_core.hookspecs import hookimpl
from adaattn_core.registry import (
    ENTRY_POINT_GROUP,
    LOAD_PLUGINS_VARIABLE,
    Registry,
    get_backend,
    get_policy,
    list_backends,
    load_registry,
)


class Fake:
    """A backend that has a name and takes arrays from one kind of device."""

    def __init__(self, devices: tuple[str, ...] = ("cpu",)) -> None:
        self.devices = devices

    def capabilities(self) -> Any:
        return type("Capabilities", (), {"array_devices": self.devices})


class Broken:
    def __init__(self) -> None:
        raise ZeroDivisionError("no such luck")


class Refusing:
    def __init__(self) -> None:
        raise UnsupportedError(got="a", needed="b", do="c")


HERE = __name__


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a plugin module and give its entry point."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules.get(HERE) or _self())

    def make(name: str, **hooks: Any) -> EntryPoint:
        module = ModuleType(f"plugin_{name}")
        for hook, body in hooks.items():
            setattr(module, hook, hookimpl(body, specname=hook))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name, module.__name__, ENTRY_POINT_GROUP)

    return make


def _self() -> ModuleType:
    module = ModuleType(HERE)
    module.__dict__.update(globals())
    return module


def _backends(*names: str, factory: str = "Fake", probe: Any = None) -> Any:
    def adaattn_register_backends(register: Any) -> None:
        for name in names:
            register(name, f"{HERE}:{factory}", probe=probe)

    return adaattn_register_backends


def _use(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> Registry:
    loaded = load_registry(list(points))
    monkeypatch.setattr(registry_module, "default_registry", lambda: loaded)
    return loaded


def test_found_loaded_once_and_by_name(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, plugin("one", adaattn_register_backends=_backends("a", "b")))
    assert [(b.name, b.plugin, b.available) for b in list_backends()] == [
        ("a", "one", True),
        ("b", "one", True),
    ]
    assert get_backend("a") is get_backend("a")
    assert get_backend("a") is not get_backend("b")


def test_a_plugin_that_does_not_import_is_isolated(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = EntryPoint("gone", "no_such_module_anywhere", ENTRY_POINT_GROUP)
    good = plugin("good", adaattn_register_backends=_backends("a"))
    loaded = _use(monkeypatch, missing, good)
    assert "ModuleNotFoundError" in loaded.failures["gone"]
    assert get_backend("a") is not None
    broken = [b for b in list_backends() if not b.available]
    assert [(b.name, b.plugin) for b in broken] == [("", "gone")]


def test_a_plugin_that_raises_leaves_nothing_behind(plugin: Any) -> None:
    def halfway(register: Any) -> None:
        register("half", f"{HERE}:Fake")
        raise RuntimeError("stopped halfway")

    loaded = load_registry(
        [
            plugin("bad", adaattn_register_backends=halfway),
            plugin("good", adaattn_register_backends=_backends("a")),
        ]
    )
    assert set(loaded.backends) == {"a"}
    assert loaded.failures == {"bad": "RuntimeError: stopped halfway"}
    assert loaded.manager.get_plugin("bad") is None


def test_a_hook_with_a_wrong_signature_is_isolated(plugin: Any) -> None:
    def strange(register: Any, colour: Any) -> None:
        register("strange", f"{HERE}:Fake")

    loaded = load_registry([plugin("odd", adaattn_register_backends=strange)])
    assert not loaded.backends
    assert "PluginValidationError" in loaded.failures["odd"]


def test_a_name_is_claimed_once(plugin: Any) -> None:
    loaded = load_registry(
        [
            plugin("first", adaattn_register_backends=_backends("a")),
            plugin("second", adaattn_register_backends=_backends("b", "a")),
            plugin("third", adaattn_register_backends=_backends("auto")),
        ]
    )
    assert set(loaded.backends) == {"a"}
    assert set(loaded.failures) == {"second", "third"}
    assert "claims the name 'a' again" in loaded.failures["second"]


def test_one_module_under_two_names_stays_registered_once(plugin: Any) -> None:
    seen: list[Any] = []
    point = plugin("one", adaattn_register_commands=lambda group: seen.append(group))
    twin = EntryPoint("two", point.value, ENTRY_POINT_GROUP)
    loaded = load_registry([point, twin])
    assert set(loaded.failures) == {"two"}
    loaded.add_commands("group")
    assert seen == ["group"]


def test_failing_commands_are_recorded(plugin: Any) -> None:
    def bad(group: Any) -> None:
        raise ValueError("no commands today")

    seen: list[Any] = []
    loaded = load_registry(
        [
            plugin("bad", adaattn_register_commands=bad),
            plugin("good", adaattn_register_commands=lambda group: seen.append(group)),
        ]
    )
    loaded.add_commands("group")
    assert seen == ["group"]
    assert loaded.failures == {"bad": "ValueError: no commands today"}


def _raise() -> str:
    raise OSError("driver asleep")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [(lambda: "no device", "no device"), (_raise, "probe failed: OSError: driver asleep")],
)
def test_probes(plugin: Any, monkeypatch: pytest.MonkeyPatch, probe: Any, reason: str) -> None:
    hook = _backends("a", probe=probe)
    _use(monkeypatch, plugin("one", adaattn_register_backends=hook))
    assert [(b.available, b.reason) for b in list_backends()] == [(False, reason)]
    with pytest.raises(BackendUnavailableError) as caught:
        get_backend("a")
    assert caught.value.facts["reason"] == reason
    with pytest.raises(BackendUnavailableError):
        get_backend("auto")


@pytest.mark.parametrize(
    ("factory", "error"),
    [("Broken", PluginError), ("nothing", PluginError), ("Refusing", UnsupportedError)],
)
def test_factories_that_fail(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, factory: str, error: type[AdaAttnError]
) -> None:
    hook = _backends("a", factory=factory)
    _use(monkeypatch, plugin("one", adaattn_register_backends=hook))
    with pytest.raises(error):
        get_backend("a")


def test_unknown_names_say_what_there_is(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EntryPoint("gone", "no_such_module_anywhere", ENTRY_POINT_GROUP)
    _use(monkeypatch, plugin("one", adaattn_register_backends=_backends("a")), missing)
    with pytest.raises(BackendUnavailableError, match="one of a, or auto") as caught:
        get_backend("b")
    assert "no_such_module_anywhere" in caught.value.do
    with pytest.raises(ArgumentError):
        get_policy("none of these")


def test_auto_takes_the_first_that_fits_the_device(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, plugin("one", adaattn_register_backends=_backends("a", "b")))
    assert get_backend("auto") is get_backend("a")
    with pytest.raises(BackendUnavailableError, match="arrays on cuda:0"):
        get_backend("auto", "cuda:0")


def test_loading_can_be_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "numpy, none_of_these")
    assert set(load_registry().backends) == {"numpy"}
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "")
    assert not load_registry().backends


def test_the_numpy_backend_comes_through_the_same_door() -> None:
    assert load_registry().backends["numpy"].plugin == "numpy"
