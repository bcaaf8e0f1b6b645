"""What must be equal for one session to go on with the results of another."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..saved.run import MARK
from ..timer.machine import environment

MACHINE = ("gpu", "gpu_id", "driver", "cuda", "torch", "triton")


def conditions(commit: Mapping[str, Any], plant: float | None, kernels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the commit, the card, the versions and the options that a result depends on.

    commit: pytest-benchmark's commit_info. kernels: the values of --sel-kernel, whose modules are imported.
    """
    machine = environment()
    return {
        "commit": commit.get("id"),
        "uncommitted changes": commit.get("dirty"),
        "source": _source(),
        "python": platform.python_version(),
        **{name: machine[name] for name in MACHINE},
        "--sel-plant": plant,
        "many ranks": None,
        "--sel-kernel": [f"{kernel} ({_module_hash(kernel)})" for kernel in kernels] or None,
    }


def differences(left: Mapping[str, Any], here: Mapping[str, Any], asked: list[list[str]]) -> str:
    """Say in one line how a journal differs from these conditions and cases; empty if it does not.

    left: the journal, as `read_json` returns it.
    """
    there, mark = left.get("conditions"), left.get(MARK)
    if not isinstance(there, Mapping) or not isinstance(mark, Mapping):
        return "its first line lacks what it was measured on"
    found = [f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    before = mark.get("asked")
    if before != asked:
        number = len(before) if isinstance(before, list) else 0
        found.append(f"{number} benchmarks asked for there, {len(asked)}{' others' * (number == len(asked))} here")
    return "; ".join(found)


def _module_hash(kernel: str) -> str:
    """Return a hash of the file that a kernel's module was imported from."""
    file = getattr(sys.modules[kernel.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "no file"


def _source() -> str:
    """Return a hash of the package's files, by which two states of uncommitted changes are told apart."""
    package = Path(__file__).parents[2]
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json", ".yaml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
