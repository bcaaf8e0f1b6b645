"""What a kernel is compared with: the fastest SDPA form of a case and scope. The screen, report, plots and rule ask.

Source: docs/measuring.md, "Scopes".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

# By scope: "op" has packing inside the time, "core" gets rows that were packed beforehand, on both sides.
TRITON = {"op": "triton", "core": "triton_core"}
SDPA_FORMS = {"op": ("packed_sdpa", "packed_sdpa_fused", "packed_sdpa_compiled"), "core": ("sdpa_core",)}
EVERY_SDPA_FORM = frozenset(form for forms in SDPA_FORMS.values() for form in forms)
PEER_METHODS = ("flex_attention", "fla_nsa", "flashinfer_paged", "dense")

CORE_SUFFIX = "_core"  # of the method that times a kernel, ours or a user's, on rows packed beforehand

Result = Mapping[str, Any]  # of one (case, method): its extra_info, and its times in µs


def kernel_of(method: str) -> str:
    """Return the name of the kernel whose method this is, with or without packing."""
    return method.removesuffix(CORE_SUFFIX)


def scope(method: str) -> str:
    """Return "op" (packing inside the time) or "core" (rows packed beforehand on both sides)."""
    return "core" if method.endswith(CORE_SUFFIX) else "op"


def is_kernel(method: str) -> bool:
    """Tell whether a method is what a commit may change, ours or a user's: neither a form of SDPA nor a peer."""
    return method not in EVERY_SDPA_FORM and method not in PEER_METHODS


def kernels_among(methods: Iterable[str]) -> list[str]:
    """Return the kernels that some methods are of, ours first, the others in their order."""
    found = dict.fromkeys(kernel_of(method) for method in methods if is_kernel(method))
    return sorted(found, key=lambda name: name != TRITON["op"])


def fastest_form(times: Mapping[str, float | None], scope: str) -> str | None:
    """Return the fastest SDPA form of a scope by these times of one case's methods; None if none of them has a time."""
    timed = {form: us for form in SDPA_FORMS[scope] if (us := times.get(form))}
    return min(timed, key=timed.__getitem__, default=None)


def fastest_sdpa(results: Iterable[Result], time: str = "device_us") -> dict[tuple[str, str], Result]:
    """Return the result of the fastest SDPA form for every (case, scope) that has one; `time` names the time."""
    grouped: dict[tuple[str, str], dict[str, Result]] = defaultdict(dict)
    for result in results:
        grouped[result["case"], result["scope"]][result["method"]] = result
    found = {}
    for key, of_case in grouped.items():
        form = fastest_form({method: result.get(time) for method, result in of_case.items()}, key[1])
        if form is not None:
            found[key] = of_case[form]
    return found


def geomean(values: Iterable[float]) -> float | None:
    """Return the geometric mean of positive numbers; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None
