"""The cases of a pytest run: what the options of the plugin in fixtures.py choose, and what its hook makes of it.

Apart from the plugin, which must not be imported before pytest loads it.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from . import cases
from .cases import Case

_CASES = pytest.StashKey[dict[str, Case]]()


def cases_of(config: pytest.Config) -> dict[str, Case]:
    """Return the cases of the run by their ids, in the order of measuring.

    Raises:
        pytest.UsageError: an unknown family, or a hook that returns a value or leaves two cases of one id.
    """
    if _CASES not in config.stash:
        option = config.getoption
        name = option("sel_matrix") or ("full" if torch.cuda.is_available() else "smoke")
        try:
            chosen = cases.matrix(name, option("sel_dtype"), option("sel_family"))
            returned = config.hook.pytest_nsa_sel_cases(config=config, cases=chosen)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        if returned:
            raise pytest.UsageError("pytest_nsa_sel_cases: returned a value, expected the list changed in place")
        if twice := [name for name, count in Counter(case.id for case in chosen).items() if count > 1]:
            raise pytest.UsageError(f"pytest_nsa_sel_cases: {twice[0]} is there twice, expected cases of different ids")
        config.stash[_CASES] = {case.id: case for case in chosen}
    return config.stash[_CASES]
