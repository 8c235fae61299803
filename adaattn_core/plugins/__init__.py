"""Plugins: the hooks that they implement, and the registry that finds them."""

from adaattn_core.plugins.hookspecs import hookimpl

__all__ = ["hookimpl"]
