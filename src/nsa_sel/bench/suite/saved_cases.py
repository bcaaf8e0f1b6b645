"""The definitions of cases that a saved run holds, so that it can be judged where their file is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from ..saved.figures import RunError, mapping, short
from .cases import Case, by_id
from .recorded import Recorded

Definitions = Mapping[str, Mapping[str, Any]]  # case id -> the fields of the case


def definitions(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Return the fields of cases by their ids."""
    return {case.id: asdict(case) for case in cases}


def rebuilt(saved: Definitions) -> dict[str, Case]:
    """Return the cases of a run's definitions by their ids.

    Raises: RunError if a definition does not make the case of its id.
    """
    return {name: _rebuilt(name, mapping(values)) for name, values in saved.items()}


def known(saved: Definitions) -> dict[str, Case]:
    """Return every case that can be looked up by its id for a run: the matrix's, and its own.

    Raises: RunError as `rebuilt`.
    """
    return {**by_id(), **rebuilt(saved)}


def _rebuilt(name: str, values: Mapping[str, Any]) -> Case:
    recorded = values.get("recorded")
    try:
        pointer = None if recorded is None else Recorded(**recorded)
        case = Case(**{**values, "recorded": pointer})
        parts: list[Any] = [case] if pointer is None else [case, pointer]
        plain = [(getattr(part, f.name), f.type) for part in parts for f in fields(part) if f.type in _PLAIN]
        if all(type(value).__name__ == kind for value, kind in plain) and case.id == name:
            return case
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise RunError(f"{short(name)}: the run's definition of this case is damaged; measure it again")


_PLAIN = ("str", "int", "bool")  # annotations are texts here
