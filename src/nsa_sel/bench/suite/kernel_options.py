"""pytest's options for users' kernels, the same for the parity and the perf suite."""

from __future__ import annotations

import pytest

from .kernels import KernelError, UserKernel, parse

_KERNELS = pytest.StashKey[tuple[UserKernel, ...]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa_sel")
    group.addoption(
        "--sel-kernel",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION[=NAME]",
        help="put this kernel, f(q, k, v, ranges, *, scale, min_len, max_len) -> out, under the suite; repeatable",
    )
    group.addoption(
        "--sel-takes",
        action="append",
        default=[],
        metavar="[NAME=]blocks:SIZE",
        help="it takes block numbers in place of ranges, and block_size; without NAME: every kernel given",
    )


def kernels_of(config: pytest.Config) -> tuple[UserKernel, ...]:
    """Return the kernels that the options name, imported when first asked for: Triton's interpreter is chosen by then.

    Raises: pytest.UsageError
    """
    if _KERNELS not in config.stash:
        try:
            config.stash[_KERNELS] = parse(config.getoption("sel_kernel"), config.getoption("sel_takes"))
        except KernelError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_KERNELS]
