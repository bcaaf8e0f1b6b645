"""The tuned launches of a GPU: which launch was measured to be the fastest for calls of a kind.

`nsa-sel tune` writes a table as `<GPU name, spaces as _>.json`. It is read from `configs/tuned/` of the working
directory, else from `tuned/` of this package. Only calls of a kind that was measured (see `Key`) find an entry: the
widths agree, and length, rows and mean span are within a factor of 1.4 of the same power of two. Others are left to
`rules.choose`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .call import Call, Gpu
from .launch_config import LaunchConfig, padded_heads

SCHEMA = 1
LOCAL = Path("configs/tuned")  # in the working directory, as configs/base.yaml
PACKAGED = Path(__file__).parents[1] / "tuned"
KERNEL = "_sel_fwd"
RETUNE = "tune again with: nsa-sel tune"
# log2 of the rows per multiprocessor from which on the GPU is full: more rows only add rounds of the same work.
FULL_GPU = 3
LONG_SPAN = 8  # log2 of the mean span length from which on spans are simply long

_ignored = ContextVar("tuned tables are ignored", default=False)
_Fields = TypeVar("_Fields")


class TableError(ValueError):
    """Say in one line why a table cannot be used, and what to do."""


@dataclass(frozen=True)
class Key:
    """Name the calls that one launch serves: equal keys, equal launch.

    heads: of a row, as the kernel pads them (at least 16). rows: log2 of rows per multiprocessor, rounded, at most
    FULL_GPU; below 0, as in decode, there are fewer rows than multiprocessors. length: log2 of the longest row's L,
    rounded. span: log2 of the mean span length, rounded, at most LONG_SPAN; -1 where a row has one span. shared_kv:
    several rows of a group attend to the same K and V, as in prefill.
    """

    element_bytes: int
    heads: int
    D: int
    Dv: int
    shared_kv: bool
    rows: int
    length: int
    span: int

    @classmethod
    def of(cls, call: Call, gpu: Gpu) -> Key:
        """Return the key of a call with N, n_spans and max_len of at least 1."""
        rows = min(_round_log2(call.N / gpu.sm_count), FULL_GPU)
        span = -1 if call.n_spans == 1 else min(max(_round_log2(call.max_len / call.n_spans), 0), LONG_SPAN)
        return cls(
            call.element_bytes,
            padded_heads(call.H),
            call.D,
            call.Dv,
            call.shared_kv,
            rows,
            _round_log2(call.max_len),
            span,
        )

    def __str__(self) -> str:
        spans = "one span" if self.span < 0 else f"spans of {2**self.span}{'+' if self.span == LONG_SPAN else ''}"
        rows = f"{2.0**self.rows:g}{'+' if self.rows == FULL_GPU else ''} rows an SM"
        shared = ", shared K/V" if self.shared_kv else ""
        width = f"H<={self.heads} D{self.D} Dv{self.Dv} {self.element_bytes} bytes"
        return f"L {2**self.length}, {spans}, {rows}{shared}, {width}"


@dataclass(frozen=True)
class Entry:
    """Hold the launch for a key, and the figures that it was chosen by (which the look-up does not read)."""

    launch: LaunchConfig
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Hold what was measured on one GPU. measured: date, torch, triton, driver, cuda, as in the file."""

    gpu: str
    measured: Mapping[str, Any]
    entries: Mapping[Key, Entry]

    def as_json(self) -> str:
        """Return the file's text, for the kernel of this source tree."""
        entries = [
            {"key": asdict(key), "launch": asdict(entry.launch), "figures": dict(entry.figures)}
            for key, entry in sorted(self.entries.items(), key=lambda item: tuple(asdict(item[0]).values()))
        ]
        head = {"schema": SCHEMA, "gpu": self.gpu, "kernel": kernel_hash(), "measured": dict(self.measured)}
        return json.dumps({**head, "entries": entries}, indent=1, ensure_ascii=False) + "\n"


def lookup(call: Call, gpu: Gpu) -> LaunchConfig | None:
    """Return the tuned launch for a call whose longest row is known; None where the table has none.

    A launch that needs TMA or clusters is not returned where there are none. Rows of one span have an entry only if
    they have one length, as those had that it was measured on: its tiles may be longer than a shorter row.
    """
    one_span_of_many_lengths = call.n_spans == 1 and not call.one_length
    if min(call.N, call.n_spans, call.max_len) < 1 or one_span_of_many_lengths or _ignored.get():
        return None
    entries = _entries(gpu.name)
    entry = entries.get(Key.of(call, gpu)) if entries else None
    if entry is None:
        return None
    has_tma = gpu.has_tma and call.fits_tma
    if (entry.launch.load == "tma" and not has_tma) or (entry.launch.cluster > 1 and not gpu.has_clusters):
        return None
    return entry.launch


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Make `lookup` find nothing: what would run untuned."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def forget() -> None:
    """Read the tables again at the next look-up."""
    _entries.cache_clear()


def file_name(gpu: str) -> str:
    """Return the name of a GPU's table, e.g. NVIDIA_H200.json."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", gpu) + ".json"


def read(path: Path, gpu: str) -> Table:
    """Read and check a GPU's table.

    Raises: TableError if it cannot be read, has another schema, or was measured on another GPU or with another kernel.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror}); {RETUNE}") from None
    except (ValueError, RecursionError):
        raise TableError(f"{path}: damaged JSON; {RETUNE}") from None
    if not isinstance(data, dict):
        raise TableError(f"{path}: not a table of tuned launches; {RETUNE}")
    for name, expected in (("schema", SCHEMA), ("gpu", gpu), ("kernel", kernel_hash())):
        if data.get(name) != expected:
            raise TableError(f"{path}: {name} is {data.get(name)!r}, expected {expected!r}; {RETUNE}")
    try:
        keys = [_from_json(Key, each["key"]) for each in data["entries"]]
        entries = {key: _entry(key, each) for key, each in zip(keys, data["entries"], strict=True)}
        if len(entries) != len(data["entries"]):
            raise ValueError("a key stands twice")
        return Table(gpu, dict(data["measured"]), entries)
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: {type(error).__name__} in its entries: {error}; {RETUNE}") from None


@functools.cache
def kernel_hash() -> str:
    """Return what a table depends on: the device code that the kernel reaches, and a launch's fields.

    Docstrings, comments, and where a function stands do not count, nor does another kernel beside this one.
    """
    text = [each.name for each in fields(LaunchConfig)] + _device_code(KERNEL, Path(__file__).parent)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _device_code(kernel: str, folder: Path) -> list[str]:
    """Return the source of a kernel and of all functions and constants that it reaches, in order of name.

    Names are looked up over the modules of `folder` that hold device code; each stands in one of them only.
    """
    known: dict[str, ast.stmt] = {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body if "@triton.jit" in source else ():
            if isinstance(node, ast.FunctionDef):
                known[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = node
    found: dict[str, str] = {}
    wanted = [kernel]
    while wanted:
        name = wanted.pop()
        if name in found or name not in known:
            continue
        node = known[name]
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
        found[name] = ast.unparse(node)
        wanted += [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
    return [found[name] for name in sorted(found)]


@functools.cache
def _entries(gpu: str) -> Mapping[Key, Entry]:
    """Return the entries of the first table of this GPU that can be used; warn of one that cannot."""
    for folder in (LOCAL, PACKAGED):
        path = folder / file_name(gpu)
        if os.path.isfile(path):  # False too where the folder may not be entered
            try:
                return read(path, gpu).entries
            except TableError as error:
                warnings.warn(f"nsa_sel: tuned table ignored: {error}", RuntimeWarning, stacklevel=2)
    return {}


def _round_log2(x: float) -> int:
    return math.floor(math.log2(x) + 0.5)


def _entry(key: Key, data: Mapping[str, Any]) -> Entry:
    launch = _from_json(LaunchConfig, data["launch"])
    if problem := launch.problem(key.D, key.Dv):
        raise ValueError(f"{launch}, expected {problem}")
    return Entry(launch, dict(data.get("figures", {})))


def _from_json(cls: type[_Fields], data: Mapping[str, Any]) -> _Fields:
    """Build a dataclass of plain fields, each of exactly its annotated type.

    Raises: ValueError or TypeError.
    """
    types = {each.name: each.type for each in fields(cls)}  # type: ignore[arg-type]
    for name, value in data.items():
        if type(value).__name__ != types.get(name):
            raise ValueError(f"{cls.__name__}.{name} is {value!r}")
    return cls(**data)
