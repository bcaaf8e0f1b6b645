"""The errors of the package that are no bad argument. `config.ConfigError` stands with the toggles."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """Report that a backend that was asked for by name cannot run this call, and why."""


class KernelFailed(UnsupportedError):
    """Report that the kernel of this call could not be compiled, loaded or started on this machine, and why."""
