"""Discovery: plugins come by entry point, one by one, and a broken one harms nobody else."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pytest

from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    BackendUnavailableError,
    PluginError,
    UnsupportedError,
)
from adaattn_core.plugins import hookimpl
from adaattn_core.plugins import registry as registry_module
from adaattn_core.plugins.registry import (
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
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "numpy, ")
    loaded = load_registry()
    assert set(loaded.backends) == {"numpy"}
    assert not loaded.misnamed
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "")
    loaded = load_registry()
    assert not loaded.backends
    monkeypatch.setattr(registry_module, "default_registry", lambda: loaded)
    with pytest.raises(BackendUnavailableError, match=LOAD_PLUGINS_VARIABLE):
        get_backend()


def test_a_mistyped_restriction_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOAD_PLUGINS_VARIABLE, "numpy,cdua")
    loaded = load_registry()
    monkeypatch.setattr(registry_module, "default_registry", lambda: loaded)
    assert ("cdua", False) in [(b.plugin, b.available) for b in list_backends()]
    for name in ("auto", "numpy"):
        with pytest.raises(PluginError, match=f"{LOAD_PLUGINS_VARIABLE} with 'cdua'"):
            get_backend(name)


def _registering(name: str, **fields: Any) -> Any:
    def adaattn_register_backends(register: Any) -> None:
        register(name, f"{HERE}:Fake", **fields)

    return adaattn_register_backends


def test_a_greedy_plugin_gets_nothing_that_is_ours(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in the alphabet, of the highest priority, and one of them under our own name."""
    greedy = plugin("aaa", adaattn_register_backends=_registering("aaa", priority=1000))
    thief = plugin("aab", adaattn_register_backends=_registering("numpy"))
    impostor = plugin("numpy", adaattn_register_backends=_registering("bbb"))
    (ours,) = entry_points(group=ENTRY_POINT_GROUP, name="numpy")
    loaded = _use(monkeypatch, greedy, thief, impostor, ours)
    assert loaded.backends["numpy"].factory.startswith("adaattn_reference")
    assert type(get_backend("auto")).__module__.startswith("adaattn_reference")
    assert "claims the name 'numpy' again" in loaded.failures["aab"]
    assert type(get_backend("aaa")) is not type(get_backend("auto"))
    assert next(b.name for b in list_backends() if b.name) == "numpy"


def test_auto_goes_by_priority_then_by_name(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"z": 5, "b": 0, "a": 0, "c": -1}
    points = [
        plugin(f"of_{name}", adaattn_register_backends=_registering(name, priority=priority))
        for name, priority in order.items()
    ]
    loaded = _use(monkeypatch, *points)
    assert [entry.name for entry in loaded.in_order()] == ["z", "a", "b", "c"]
    assert get_backend("auto") is get_backend("z")


@pytest.mark.parametrize("priority", [1001, 0.5, True, "high"])
def test_priorities_are_whole_numbers(plugin: Any, priority: Any) -> None:
    hook = _registering("a", priority=priority)
    loaded = load_registry([plugin("one", adaattn_register_backends=hook)])
    assert not loaded.backends
    assert "priority" in loaded.failures["one"]


def test_a_probe_is_asked_once_until_backends_are_listed(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[str | None] = ["asleep", None]
    asked: list[int] = []

    def probe() -> str | None:
        asked.append(len(asked))
        return answers[min(len(asked) - 1, 1)]

    hook = _backends("a", probe=probe)
    _use(monkeypatch, plugin("one", adaattn_register_backends=hook))
    for _ in range(3):
        with pytest.raises(BackendUnavailableError):
            get_backend("auto")
        with pytest.raises(BackendUnavailableError):
            get_backend("a")
    assert len(asked) == 1
    assert [b.available for b in list_backends()] == [True]
    assert all(get_backend("auto") is get_backend("a") for _ in range(3))
    assert len(asked) == 2


def test_the_numpy_backend_comes_through_the_same_door() -> None:
    assert load_registry().backends["numpy"].plugin == "numpy"
