"""Cases of one's own from a YAML file, read strictly: every error is one line that names the line and the key.

Source: docs/cases.md.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from ... import spans
from ...recording import RecordingError, load
from . import cases
from .cases import DTYPES, RECORDED, Case
from .recorded import SHORT_DTYPES, point_to


class CaseFileError(ValueError):
    """Say in one line what is wrong in a file of cases, and in which line of it."""


Line = int
Values = dict[str, list[tuple[Any, Line]]]  # key -> its values, of which there are several where a list is given
SIZES = ("H", "D", "Dv", "L", "N", "S", "G", "block", "batch", "context")
# family -> keys that it needs, keys that it may have
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rows": (("distribution", "H", "D", "Dv", "L", "N"), ()),
    "ragged": (("H", "D", "Dv", "L", "N"), ("distribution",)),
    "decode": (("distribution", "H", "D", "Dv", "L", "batch", "context"), ("G", "block", "N")),
    "prefill": (("distribution", "H", "D", "Dv", "L", "S", "G"), ("block", "N")),
}
EVERYWHERE = ("dtype", "name")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read(path: str | os.PathLike[str], dtype: str = "bf16") -> list[Case]:
    """Return the cases of a file in its order; dtype: of the entries that name none.

    Raises: CaseFileError.
    """
    return _File(Path(path)).cases(dtype)


class _File:
    """Read one file; it knows the name that its errors begin with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, line: Line, text: str) -> CaseFileError:
        return CaseFileError(f"{self.path} line {line}: {text}")

    def cases(self, dtype: str) -> list[Case]:
        found: dict[str, tuple[Case, Line]] = {}
        for entry in self._entries():
            line = entry.start_mark.line + 1
            for case in self._of_entry(entry, dtype):
                if case.id in found:
                    raise self.error(line, f"case {case.id} is in line {found[case.id][1]} already; give one a name")
                found[case.id] = case, line
        return [case for case, _ in found.values()]

    def _entries(self) -> list[yaml.Node]:
        try:
            root = yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise CaseFileError(f"{self.path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CaseFileError(f"{self.path}: is no text in UTF-8") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self.error(mark.line + 1 if mark else 1, f"is no YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise CaseFileError(f"{self.path}: is no YAML: {str(error).splitlines()[0]}") from None
        if root is None:
            raise CaseFileError(f"{self.path}: is empty, expected cases:")
        top = self._mapping(root, "the file")
        for key, (_, line) in top.items():
            if key != "cases":
                raise self.error(line, f"key is {key!r}, expected cases")
        node, line = top.get("cases", (None, 1))
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.error(line, "cases: expected a list of at least one case")
        return node.value

    def _mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, Line]]:
        """Return the nodes of a mapping by key, each with its key's line."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise self.error(line, f"{what} is {_shown(node)}, expected key: value")
        found: dict[str, tuple[yaml.Node, Line]] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(line, f"key is {_shown(key)}, expected a word")
            if key.value in found:
                raise self.error(line, f"{key.value}: is given twice, first in line {found[key.value][1]}")
            found[key.value] = value, line
        return found

    def _of_entry(self, entry: yaml.Node, dtype: str) -> Iterator[Case]:
        line = entry.start_mark.line + 1
        nodes = self._mapping(entry, "a case")
        if "recorded" in nodes and "family" not in nodes:
            self._check_keys(nodes, line, RECORDED, ("recorded",), ("name",))
            yield from self._recorded(self._values(nodes))
            return
        if "family" not in nodes:
            raise self.error(line, "family: is missing; so is recorded, of which a case has one")
        families = self._list("family", *nodes.pop("family"))
        for family, at in families:
            if family not in KEYS:
                raise self.error(at, f"family: value is {family!r}, expected one of {', '.join(KEYS)}")
            needed, optional = KEYS[family]
            self._check_keys(nodes, line, family, needed, (*optional, *EVERYWHERE))
        values = self._values(nodes)
        for (family, _), *combination in itertools.product(families, *values.values()):
            lines = {key: at for key, (_, at) in zip(values, combination, strict=True)}
            chosen = {key: value for key, (value, _) in zip(values, combination, strict=True)}
            try:
                yield _BUILD[family]({"dtype": dtype, "name": "", **chosen})
            except ValueError as error:
                key, _, text = str(error).partition(": ")
                key = "distribution" if key == "layout" else key
                raise self.error(lines.get(key, line), f"{key}: {text}") from None

    def _check_keys(
        self,
        nodes: Mapping[str, tuple[yaml.Node, Line]],
        line: Line,
        family: str,
        needed: tuple[str, ...],
        optional: tuple[str, ...],
    ) -> None:
        for key, (_, at) in nodes.items():
            if key not in (*needed, *optional):
                raise self.error(at, f"key is {key!r}, expected one of {', '.join((*needed, *optional))} for {family}")
        for key in needed:
            if key not in nodes:
                raise self.error(line, f"{key}: is missing, {family} needs it")

    def _values(self, nodes: Mapping[str, tuple[yaml.Node, Line]]) -> Values:
        return {key: self._list(key, *node) for key, node in nodes.items()}

    def _list(self, key: str, node: yaml.Node, line: Line) -> list[tuple[Any, Line]]:
        """Return the checked values of a key: those of a list, or the one that it has."""
        if not isinstance(node, yaml.SequenceNode):
            return [(self._value(key, node, line), line)]
        found: list[tuple[Any, Line]] = []
        for item in node.value:
            at = item.start_mark.line + 1
            value = self._value(key, item, at)
            if value in [known for known, _ in found]:
                raise self.error(at, f"{key}: value {value!r} is in the list twice")
            found.append((value, at))
        if not found:
            raise self.error(line, f"{key}: is an empty list, expected a value or several")
        return found

    def _value(self, key: str, node: yaml.Node, line: Line) -> Any:
        expected = {"dtype": f"one of {', '.join(DTYPES)}", "name": "letters, digits, _, - and ."}.get(key, "a word")
        if key in SIZES:
            expected = "a whole number of at least 1"
        if isinstance(node, yaml.ScalarNode):
            text = node.value
            if key in SIZES and node.tag.endswith(":int") and re.fullmatch("[1-9][0-9]{0,17}", text):
                return int(text)
            is_word = key not in SIZES and node.tag.endswith(":str") and text
            if is_word and (key != "dtype" or text in DTYPES) and (key != "name" or NAME.fullmatch(text)):
                return text
        raise self.error(line, f"{key}: value is {_shown(node)}, expected {expected}")

    def _recorded(self, values: Values) -> Iterator[Case]:
        for (pattern, line), (name, _) in itertools.product(values["recorded"], values.get("name", [("", 0)])):
            paths = sorted(glob(pattern, root_dir=self.path.parent, recursive=True))
            if not paths:
                raise self.error(line, f"recorded: nothing matches {pattern!r} in {self.path.parent.absolute()}")
            for path in paths:
                try:
                    yield recorded_case(self.path.parent / path, name)
                except RecordingError as error:
                    raise self.error(line, f"recorded: {error}") from None


def recorded_case(path: Path, name: str = "") -> Case:
    """Return the case that a recorded call is.

    Raises: RecordingError if it cannot be read, or selects nothing.
    """
    call = load(path)
    B, S, G = call.ranges.shape[:3]
    lengths = spans.lengths(call.ranges, call.S_kv)
    if lengths.numel() == 0 or int(lengths.max()) == 0:
        raise RecordingError(f"{path}: selects no token")
    return Case(
        RECORDED,
        SHORT_DTYPES[call.dtype],
        RECORDED,
        call.H,
        call.D,
        call.Dv,
        int(lengths.max()),
        B * S * G,
        S=S,
        G=G,
        S_kv=call.S_kv,
        name=name,
        recorded=point_to(path, call, int(lengths.min())),
    )


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _rows(values: dict[str, Any]) -> Case:
    name, distribution = values.pop("name"), values.pop("distribution", "ragged")
    case = cases.ragged_case(**values) if distribution == "ragged" else cases.rows_case(layout=distribution, **values)
    return replace(case, name=name)


def _ragged(values: dict[str, Any]) -> Case:
    if (distribution := values.get("distribution", "ragged")) != "ragged":
        raise ValueError(f"distribution: value is {distribution!r}, expected ragged for the family ragged")
    return _rows(values)


def _decode(values: dict[str, Any]) -> Case:
    name, N = values.pop("name"), values.pop("N", None)
    case = cases.decode_case(layout=values.pop("distribution"), **values)
    if N not in (None, case.N):
        raise ValueError(f"N: value is {N}, expected {case.N}, the batch times {case.G} groups; N can be left out")
    return replace(case, name=name)


def _prefill(values: dict[str, Any]) -> Case:
    name, rows = values.pop("name"), values["S"] * values["G"]
    N = values.pop("N", rows)
    if N % rows:
        raise ValueError(f"N: value is {N}, expected a multiple of S times G, which is {rows}; N can be left out")
    return replace(cases.prefill_case(layout=values.pop("distribution"), batch=N // rows, **values), name=name)


_BUILD: dict[str, Callable[[dict[str, Any]], Case]] = {
    "rows": _rows,
    "ragged": _ragged,
    "decode": _decode,
    "prefill": _prefill,
}
