"""The tuned launches of a GPU: which launch was measured to be the fastest for calls of a kind. Pure Python.

`nsa-sel tune` writes a table as `<GPU name, spaces as _>.json`. It is read from `configs/tuned/` of the working
directory, else from `tuned/` of this package. Only calls of a kind that was measured (see `Key`) find an entry: the
widths agree, and length, rows and mean span are within a factor of 1.4 of the same power of two. Others are left to
`tuning.choose`.
"""

from __future__ import annotations

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

from .tuning import LaunchConfig, padded_heads

SCHEMA = 1
LOCAL = Path("configs/tuned")  # in the working directory, as configs/base.yaml
PACKAGED = Path(__file__).with_name("tuned")
DEVICE_CODE = ("kernels.py", "tiles.py")
RETUNE = "tune again with: nsa-sel tune"
FULL_GPU = (
    3  # log2 of the rows a multiprocessor from which on a GPU is full: more rows only add rounds of the same work
)
LONG_SPAN = 8  # log2 of the mean span length from which on spans are simply long

_ignored = ContextVar("tuned tables are ignored", default=False)
_Fields = TypeVar("_Fields")


class TableError(ValueError):
    """Say in one line why a table cannot be used, and what to do."""


@dataclass(frozen=True)
class Key:
    """Name the calls that one launch serves: equal keys, equal launch.

    heads: of a row, as the kernel pads them (at least 16). rows: log2 of rows a multiprocessor, rounded, at most
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
    def of(
        cls,
        *,
        N: int,
        H: int,
        D: int,
        Dv: int,
        n_spans: int,
        max_len: int,
        shared_kv: bool,
        element_bytes: int,
        sm_count: int,
    ) -> Key:
        """Return the key of a call with N, n_spans and max_len of at least 1 on a GPU with sm_count multiprocessors."""
        rows = min(_round_log2(N / sm_count), FULL_GPU)
        span = -1 if n_spans == 1 else min(max(_round_log2(max_len / n_spans), 0), LONG_SPAN)
        heads = padded_heads(H)
        return cls(element_bytes, heads, D, Dv, shared_kv, rows, _round_log2(max_len), span)

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


def lookup(
    gpu: str,
    *,
    N: int,
    H: int,
    D: int,
    Dv: int,
    n_spans: int,
    max_len: int | None,
    shared_kv: bool,
    element_bytes: int,
    sm_count: int,
    has_tma: bool,
    has_clusters: bool = False,
    one_length: bool = False,
) -> LaunchConfig | None:
    """Return the tuned launch for a call, None where the table has none or the call's length is not known.

    Arguments as of `tuning.choose`. has_tma: the call's tensors fit TMA descriptors. A launch that needs them, or
    clusters, is not returned where there are none. Rows of one span have an entry only if they have one length, as
    those had that it was measured on: its tiles may be longer than a shorter row.
    """
    if max_len is None or min(N, n_spans, max_len) < 1 or (n_spans == 1 and not one_length) or _ignored.get():
        return None
    entries = _entries(gpu)
    if not entries:
        return None
    key = Key.of(
        N=N,
        H=H,
        D=D,
        Dv=Dv,
        n_spans=n_spans,
        max_len=max_len,
        shared_kv=shared_kv,
        element_bytes=element_bytes,
        sm_count=sm_count,
    )
    entry = entries.get(key)
    if entry is None or (entry.launch.load == "tma" and not has_tma) or (entry.launch.cluster > 1 and not has_clusters):
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
        entries = {_from_json(Key, each["key"]): _entry(each) for each in data["entries"]}
        if len(entries) != len(data["entries"]):
            raise ValueError("a key stands twice")
        return Table(gpu, dict(data["measured"]), entries)
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: {type(error).__name__} in its entries: {error}; {RETUNE}") from None


@functools.cache
def kernel_hash() -> str:
    """Return what a table depends on: the device code without comments and blank lines, and a launch's fields."""
    text = [each.name for each in fields(LaunchConfig)]
    for name in DEVICE_CODE:
        source = Path(__file__).with_name(name).read_text(encoding="utf-8")
        text += [line.partition("#")[0].rstrip() for line in source.splitlines()]
    return hashlib.sha256("\n".join(filter(None, text)).encode()).hexdigest()[:16]


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


def _entry(data: Mapping[str, Any]) -> Entry:
    launch = _from_json(LaunchConfig, data["launch"])
    if min(launch.block_l, launch.block_d, launch.block_dv, launch.num_warps, launch.num_stages, launch.splits) < 1:
        raise ValueError(f"{launch} is no launch")
    if launch.cluster < 1 or launch.splits % launch.cluster:
        raise ValueError(f"{launch}: cluster does not divide splits")
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
