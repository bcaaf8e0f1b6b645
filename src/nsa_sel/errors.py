"""The errors of the package that are no bad argument. `config.ConfigError` stands with the toggles."""

from __future__ import annotations

import os

CACHE_ERRORS = (OSError, EOFError, ImportError, KeyError, ValueError)  # a cache without room or rights, or with damage


class UnsupportedError(RuntimeError):
    """Report that a backend that was asked for by name cannot run this call, and why."""


class KernelFailed(UnsupportedError):
    """Report that the kernel of this call could not be compiled, loaded or started on this machine, and why."""


def kernel_failed(launch: object, error: Exception) -> KernelFailed:
    """Say in one line which kernel did not compile, load or start, and where to look."""
    reason = f"the kernel ({launch}) cannot be compiled or started: {type(error).__name__}: {error}"
    if isinstance(error, CACHE_ERRORS):
        folder = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
        reason += f"; compiled kernels are kept in {folder}: clear it, or set TRITON_CACHE_DIR to a folder with room"
    return KernelFailed(" ".join(reason.split()))
