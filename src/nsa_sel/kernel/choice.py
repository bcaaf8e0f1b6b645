"""Why a call has its launch: whether the tuned table or the rules chose it, and which rule decided each field.

Source: docs/kernel.md, "Why this launch".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import rules, tuned_table
from .call import Call, Gpu
from .launch_config import LaunchConfig
from .tuned_table import Key

RULES, TUNED = "rules", "tuned table"


@dataclass(frozen=True)
class Explained:
    """Hold a launch, who chose it (RULES or TUNED), why in one line, and what decided each field, by its name."""

    launch: LaunchConfig
    source: str
    reason: str
    by_field: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def explain(call: Call, gpu: Gpu, known_length: bool = True) -> Explained:
    """Return the launch of a call, as `launch.launch_for` chooses it, and why.

    known_length: the caller gives max_len; without it the tuned table is not looked at.
    """
    tuned = tuned_table.lookup(call, gpu) if known_length else None
    if tuned is not None:
        reason = f"measured to be the fastest for {Key.of(call, gpu)}"
        return Explained(tuned, TUNED, reason, dict.fromkeys(vars(tuned), TUNED))
    choice = rules.decide(call, gpu)
    return Explained(choice.launch, RULES, choice.reason, choice.by_field)
