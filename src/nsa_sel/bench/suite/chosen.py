"""The cases of a pytest run: what the options of the plugin in fixtures.py choose, and what its hook makes of it.

Apart from the plugin, which must not be imported before pytest loads it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from . import case_file, cases, random_cases
from .cases import Case
from .saved_cases import definitions

_CASES = pytest.StashKey[dict[str, Case]]()
_ASKED_FOR = pytest.StashKey[list[Case]]()


def cases_of(config: pytest.Config) -> dict[str, Case]:
    """Return the cases of the run by their ids, in the order of measuring.

    Raises:
        pytest.UsageError: as `asked_for`; a hook that returns a value or leaves two cases of one id.
    """
    if _CASES not in config.stash:
        chosen = list(asked_for(config))
        try:
            returned = config.hook.pytest_nsa_sel_cases(config=config, cases=chosen)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        if returned:
            raise pytest.UsageError("pytest_nsa_sel_cases: returned a value, expected the list changed in place")
        if twice := [name for name, count in Counter(case.id for case in chosen).items() if count > 1]:
            raise pytest.UsageError(f"pytest_nsa_sel_cases: {twice[0]} is there twice, expected cases of different ids")
        config.stash[_CASES] = {case.id: case for case in chosen}
    return config.stash[_CASES]


def asked_for(config: pytest.Config) -> list[Case]:
    """Return the cases that the options choose, before any hook changes them.

    Raises:
        pytest.UsageError: an unknown family, a bad file of cases, or options that do not go together.
    """
    if _ASKED_FOR not in config.stash:
        option = config.getoption
        names = "sel_matrix", "sel_family", "sel_seed", "sel_count"
        file, others = option("sel_cases"), [name for name in names if option(name) is not None]
        try:
            if file and others:
                other = others[0].replace("_", "-")
                raise ValueError(f"--sel-cases: stands in place of --{other}; give one of them")
            name = option("sel_matrix") or ("full" if torch.cuda.is_available() else "smoke")
            dtype, rest = option("sel_dtype"), (option("sel_family"), option("sel_seed"), option("sel_count"))
            found = case_file.read(file, dtype) if file else random_cases.of_matrix(name, dtype, *rest)
            config.stash[_ASKED_FOR] = found
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_ASKED_FOR]


def notes_of(config: pytest.Config) -> dict[str, Any]:
    """Return what a saved run says of its cases, so that it can be judged where no file and no hook is.

    `case_file`: the name of the file that they are from. `cases`: their definitions, of that file's all, else of those
    that are in no matrix. `random`: the seed and the count of the matrix of that name.
    """
    chosen = config.stash.get(_CASES, {})
    if file := config.getoption("sel_cases", None):
        return {"case_file": Path(file).name, "cases": definitions(chosen.values())}
    known = cases.by_id() if chosen else {}
    added = definitions(case for name, case in chosen.items() if name not in known)
    random = random_of(config)
    return {**({"random": random} if random else {}), **({"cases": added} if added else {})}


def random_of(config: pytest.Config) -> dict[str, int]:
    """Return the seed and the count of a run of the matrix `random`, nothing of any other."""
    option = config.getoption
    matrix = option("sel_matrix", None)
    return random_cases.asked_for(matrix, option("sel_seed", None), option("sel_count", None)) if matrix else {}
