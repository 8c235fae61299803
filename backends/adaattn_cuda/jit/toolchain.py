"""Where NVRTC is and which version it has, found without loading it when that is possible."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from adaattn_core.errors import BackendUnavailableError

__all__ = ["INSTALL_HINT", "nvrtc_version"]

INSTALL_HINT = "pip install 'adaattn[cuda]' (cuda-core, nvidia-cuda-nvrtc, nvidia-cuda-runtime)"


@cache
def nvrtc_version() -> str:
    """Version of the NVRTC that a compile would use; part of every cache key.

    The pip wheel's metadata answers without mapping the 140 MB library; only a system toolkit
    has to be loaded to be asked.

    Raises
    ------
    BackendUnavailableError
        If neither a wheel nor a toolkit brings NVRTC.
    """
    major = _bindings_major()
    wheel = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    try:
        return version(wheel)
    except PackageNotFoundError:
        return _toolkit_version()


def _bindings_major() -> int:
    try:
        version("cuda-core")
        return int(version("cuda-bindings").split(".")[0])
    except PackageNotFoundError as error:
        raise BackendUnavailableError(
            got=f"no {error.name} package",
            needed="cuda-core and cuda-bindings, through which NVRTC is called",
            do=INSTALL_HINT,
            reason=f"{error.name} is not installed",
        ) from None


def _toolkit_version() -> str:
    # Deferred on purpose: pathfinder costs 0.1 s, and the pip wheel answers without it.
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib  # noqa: PLC0415

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (DynamicLibNotFoundError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(
            got=f"no NVRTC library ({type(error).__name__})",
            needed="NVRTC from the pip wheel or a CUDA toolkit",
            do=INSTALL_HINT,
            reason="NVRTC is not installed",
        ) from error
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value} (toolkit)"
