"""Discovery: plugins found by entry point, loaded one by one, each failure isolated.

AdaAttn's own plugins are loaded first, so no other can claim their names, and ``"auto"`` asks
their backends first; both they and the others by the priority that they state, then by name:
what `attention` runs on does not depend on what a plugin is called.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from adaattn_core.backend import Backend, Capabilities
from adaattn_core.checks import shown, whole, word
from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    BackendUnavailableError,
    PluginError,
)
from adaattn_core.plugins import hookspecs

ENTRY_POINT_GROUP = "adaattn"
OWN_DISTRIBUTION = "adaattn"
"""Distribution whose plugins come first."""
LOAD_PLUGINS_VARIABLE = "ADAATTN_LOAD_PLUGINS"

BUILT_IN_POLICIES = {
    "budget": "adaattn_core.policies.budget:BudgetPolicy",
    "entropy": "adaattn_core.policies.entropy:EntropyPolicy",
    "fixed": "adaattn_core.policies.fixed:FixedPolicy",
    "exact": "adaattn_core.policies.fixed:ExactPolicy",
}
"""Policies that need no argument; a plugin may add more but not replace these."""

PRIORITY_MOST = 1000
"""Priorities lie between the negative of this and this."""

Probe = Callable[[], str | None]
"""Cheap check: None if the backend can run here, else the reason why not."""


@dataclass(slots=True)
class Registration:
    """A name that a plugin claimed.

    Attributes
    ----------
    name : str
    factory : str
        ``"module:attribute"``, imported on first use.
    plugin : str
        Entry point that brought it.
    probe : callable or None
    priority : int
        ``"auto"`` asks the highest first, AdaAttn's own backends before all others.
    own : bool
        Whether AdaAttn's own distribution brought it; ``"auto"`` asks those before all others.
    """

    name: str
    factory: str
    plugin: str
    probe: Probe | None = None
    priority: int = 0
    own: bool = False
    instance: Any = None
    _probed: bool = False
    _reason: str | None = None

    def unavailable_reason(self, *, again: bool = False) -> str | None:
        """Return why it cannot be used on this machine, or None; probed once unless `again`."""
        if self.probe is not None and (again or not self._probed):
            try:
                reason = self.probe()
            except Exception as error:  # a broken probe must not harm the others
                reason = f"probe failed: {type(error).__name__}: {error}"
            self._reason, self._probed = reason, True
        return self._reason

    def load(self) -> Any:
        """Import the factory and call it, once."""
        if self.instance is None:
            module, _, attribute = self.factory.partition(":")
            try:
                self.instance = getattr(importlib.import_module(module), attribute)()
            except AdaAttnError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise PluginError(
                    got=f"{self.factory} of plugin {self.plugin!r}: {what}",
                    needed="an importable factory without arguments",
                    do="reinstall or report the plugin; the other backends still work",
                    plugin=self.plugin,
                ) from error
        return self.instance


@dataclass(slots=True)
class Registry:
    """Everything that plugins brought; build one with `load_registry`.

    Attributes
    ----------
    backends, policies : dict of str to Registration
    failures : dict of str to str
        Plugins that did not load, and why.
    chosen : dict of str to Backend
        What ``"auto"`` found for arrays on a kind of device; kept until backends are listed.
    installed : tuple of str
        Names of all installed plugins, loaded or not.
    misnamed : tuple of str
        Names in ``ADAATTN_LOAD_PLUGINS`` that no installed plugin has.
    """

    backends: dict[str, Registration] = field(default_factory=dict)
    policies: dict[str, Registration] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, Backend] = field(default_factory=dict)
    installed: tuple[str, ...] = ()
    misnamed: tuple[str, ...] = ()
    manager: pluggy.PluginManager = field(
        default_factory=lambda: pluggy.PluginManager(ENTRY_POINT_GROUP)
    )

    def add_plugin(self, name: str, module: Any, *, own: bool = False) -> None:
        """Register one plugin's hooks; on failure record it and leave nothing of it behind."""
        claimed: tuple[dict[str, Registration], dict[str, Registration]] = ({}, {})
        try:
            self.manager.register(module, name=name)
            for table, known, hook in (
                (claimed[0], self.backends, "adaattn_register_backends"),
                (claimed[1], self.policies, "adaattn_register_policies"),
            ):
                others = [p for p in self.manager.get_plugins() if p is not module]
                self.manager.subset_hook_caller(hook, others)(
                    register=_collector(name, table, known, own)
                )
        except Exception as error:  # isolation is this function's purpose
            if self.manager.get_plugin(name) is module:
                self.manager.unregister(module)
            self.failures[name] = f"{type(error).__name__}: {error}"
            return
        self.backends.update(claimed[0])
        self.policies.update(claimed[1])

    def add_commands(self, group: Any) -> None:
        """Let every plugin add its commands; a failing one is recorded and skipped."""
        for name, module in self.manager.list_name_plugin():
            others = [p for p in self.manager.get_plugins() if p is not module]
            try:
                self.manager.subset_hook_caller("adaattn_register_commands", others)(
                    group=group
                )
            except Exception as error:  # isolation, as above
                self.failures[name] = f"{type(error).__name__}: {error}"

    def warm_up(self, say: Callable[[str], None], arch: str | None, jobs: int) -> None:
        """Let every plugin do what a first call would wait for."""
        self.manager.hook.adaattn_warm_up(say=say, arch=arch, jobs=jobs)

    def in_order(self) -> list[Registration]:
        """Backends in the order in which ``"auto"`` asks them."""
        return sorted(self.backends.values(), key=lambda e: (not e.own, -e.priority, e.name))


def _collector(
    plugin: str, table: dict[str, Registration], known: dict[str, Registration], own: bool
) -> Callable[..., None]:
    def register(
        name: str, factory: str, probe: Probe | None = None, priority: int = 0
    ) -> None:
        word("name", name)
        word("factory", factory)
        whole("priority", priority, -PRIORITY_MOST, PRIORITY_MOST)
        if name in known or name in table or name == "auto":
            raise PluginError(
                got=f"plugin {plugin!r} claims the name {name!r} again",
                needed="a name that no other plugin uses",
                do="rename it, or uninstall one of the two plugins",
                plugin=plugin,
            )
        table[name] = Registration(name, factory, plugin, probe, priority, own)

    return register


def load_registry(points: list[EntryPoint] | None = None) -> Registry:
    """Load every plugin in isolation.

    Parameters
    ----------
    points : list of EntryPoint, optional
        Default: the installed entry points of group ``adaattn``, restricted to the
        comma-separated names in ``ADAATTN_LOAD_PLUGINS`` if that variable is set.
    """
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    for name, factory in BUILT_IN_POLICIES.items():
        registry.policies[name] = Registration(name, factory, "adaattn")
    if points is None:
        wanted = os.environ.get(LOAD_PLUGINS_VARIABLE)
        found = list(entry_points(group=ENTRY_POINT_GROUP))
        registry.installed = tuple(sorted(p.name for p in found))
        names = set(registry.installed) if wanted is None else _names(wanted)
        registry.misnamed = tuple(sorted(names - {*registry.installed}))
        for name in registry.misnamed:
            registry.failures[name] = f"named in {LOAD_PLUGINS_VARIABLE}, but not installed"
        points = [p for p in found if p.name in names]
    for point in sorted(points, key=lambda p: (not _is_own(p), p.name)):
        try:
            module = point.load()
        except Exception as error:  # one broken plugin must not hide the others
            registry.failures[point.name] = f"{type(error).__name__}: {error}"
            continue
        registry.add_plugin(point.name, module, own=_is_own(point))
    return registry


def _is_own(point: EntryPoint) -> bool:
    """Whether AdaAttn itself brought an entry point; the name alone proves nothing."""
    return point.dist is not None and point.dist.name == OWN_DISTRIBUTION


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",")} - {""}


@cache
def default_registry() -> Registry:
    """Return the registry of the installed plugins, loaded on first use."""
    return load_registry()


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One line of `adaattn backends`."""

    name: str
    plugin: str
    available: bool
    reason: str


def list_backends() -> list[BackendInfo]:
    """Return every known backend, asked anew, and every plugin that failed to load."""
    registry = default_registry()
    registry.chosen.clear()
    rows = []
    for entry in registry.in_order():
        reason = entry.unavailable_reason(again=True)
        rows.append(BackendInfo(entry.name, entry.plugin, reason is None, reason or ""))
    rows += [BackendInfo("", name, False, why) for name, why in registry.failures.items()]
    return rows


def get_backend(
    name: str = "auto",
    device: str = "cpu",
    serves: Callable[[Capabilities], bool] | None = None,
) -> Backend:
    """Return a backend by name.

    Parameters
    ----------
    name : str
        A registered name, or ``"auto"``: the first available backend that takes arrays on
        `device`, AdaAttn's own before all others, then by priority, then by name. Whether a
        backend is available is found out once; `list_backends` finds it out again.
    device : str
        Where the arrays live (used by ``"auto"`` only).
    serves : callable, optional
        Whether capabilities suffice for what is asked (used by ``"auto"`` only): the first such
        backend is taken; where there is none, the first of all, which says what it lacks.

    Raises
    ------
    BackendUnavailableError
        If the name is unknown or the backend cannot run on this machine.
    PluginError
        If ``ADAATTN_LOAD_PLUGINS`` names a plugin that is not installed.
    """
    registry = default_registry()
    if registry.misnamed:
        raise PluginError(
            got=f"{LOAD_PLUGINS_VARIABLE} with {', '.join(map(shown, registry.misnamed))}",
            needed=f"names of installed plugins: {', '.join(registry.installed) or 'none'}",
            do=f"correct {LOAD_PLUGINS_VARIABLE}, or unset it to load them all",
            plugin=registry.misnamed[0],
        )
    if not isinstance(name, str):
        raise ArgumentError(
            got=f"backend {shown(name)}",
            needed="a name",
            do='use "auto", or see `adaattn backends`',
        )
    if name == "auto":
        return _auto(registry, device, serves)
    if name not in registry.backends:
        known = ", ".join(sorted(registry.backends)) or "none installed"
        raise BackendUnavailableError(
            got=f"backend {name!r}",
            needed=f"one of {known}, or auto",
            do=_broken_hint(registry),
            reason="unknown name",
        )
    entry = registry.backends[name]
    reason = entry.unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(
            got=f"backend {name!r}: {reason}",
            needed="a backend that can run on this machine",
            do='see `adaattn backends`, or use backend="auto"',
            reason=reason,
        )
    backend: Backend = entry.load()
    return backend


def _auto(
    registry: Registry, device: str, serves: Callable[[Capabilities], bool] | None
) -> Backend:
    kind = device.split(":")[0]
    first = registry.chosen.get(kind)
    if first is not None and (serves is None or serves(first.capabilities())):
        return first
    for entry in registry.in_order():
        if entry.unavailable_reason() is None:
            backend: Backend = entry.load()
            can = backend.capabilities()
            if kind in can.array_devices:
                first = registry.chosen.setdefault(kind, backend)
                if serves is None or serves(can):
                    return backend
    if first is not None:
        return first
    raise BackendUnavailableError(
        got=f"arrays on {device}, and backends {', '.join(registry.backends) or 'none'}",
        needed="an installed backend that runs here and takes arrays from there",
        do=_broken_hint(registry),
        reason=f"no backend for {kind}",
    )


def _broken_hint(registry: Registry) -> str:
    if registry.failures:
        broken = "; ".join(f"{n}: {why}" for n, why in registry.failures.items())
        return f"repair the plugins that failed to load ({broken})"
    if LOAD_PLUGINS_VARIABLE in os.environ:
        return f"unset {LOAD_PLUGINS_VARIABLE}, which restricts what is loaded"
    return "see `adaattn backends` for what is installed"


def get_policy(name: str) -> Any:
    """Return a policy by name.

    Raises
    ------
    ArgumentError
        If no installed policy has that name.
    """
    registry = default_registry()
    if not isinstance(name, str) or name not in registry.policies:
        raise ArgumentError(
            got=f"policy {shown(name)}",
            needed=f"one of {', '.join(sorted(registry.policies))}",
            do="use one of these; a calibrated policy also needs the path of its plans",
        )
    return registry.policies[name].load()
