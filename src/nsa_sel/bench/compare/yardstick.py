"""What the machine explains of a difference between two runs: the launch floor, another card, a moved yardstick.

SDPA does not change with a commit of the kernel, so that what moves its times is the machine.
Source: docs/measuring.md, "Comparing two runs".
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ..saved.run import Run, Timing
from ..saved.speedups import EVERY_SDPA_FORM
from ..timer.calibration import limit_us

FLOOR_US = 0.5  # the least difference that can be a regression
MOVED = 0.03  # the SDPA timings' median ratio beyond which the machine itself has changed
SHORT_US = 20.0  # SDPA timings below this show the launch floor
FEWEST_SHORT = 20  # such timings, or nothing is known of it
SAID_SHIFT_US = 0.05
LARGEST_SHIFT_US = 1.0  # more is no launch floor, and is not taken off, so that it cannot hide much


@dataclass(frozen=True)
class Machine:
    """Hold what differs between the machines of two runs; times are µs."""

    shift_us: float = 0.0  # of the launch floor: every short call takes so much longer, SDPA's too
    sdpa_ratio: float | None = None  # median of new / old over the SDPA timings, after all corrections
    other_card: bool = False
    cards: tuple[Run, Run] | None = None  # old and new, where the calibration explains the other card

    @property
    def judged(self) -> bool:
        """Tell whether the runs can be compared: on one card, or on two whose calibration is known."""
        return not self.other_card or self.cards is not None

    @property
    def taken_off_us(self) -> float:
        return self.shift_us if abs(self.shift_us) <= LARGEST_SHIFT_US else 0.0

    @property
    def moved(self) -> bool:
        large = abs(self.shift_us) > LARGEST_SHIFT_US
        return large or (self.sdpa_ratio is not None and abs(self.sdpa_ratio - 1) > MOVED)

    def corrected(self, timing: Timing) -> Timing:
        """Return a new timing as the old run's machine would have measured it."""
        timing = _on_the_old_card(timing, *self.cards) if self.cards else timing
        return timing.shifted(-self.taken_off_us)


def explain(old: Run, new: Run) -> Machine:
    """Return what the machines explain of the differences between two runs."""
    pairs = [(old.timings[key].card, new.timings[key].card) for key in old.timings if key in new.timings]
    moved = {(before, after) for before, after in pairs if before != after}
    other_card = bool(moved)
    calibrated = all(old.calibration_of(before) and new.calibration_of(after) for before, after in moved)
    cards = (old, new) if other_card and calibrated else None
    common = [key for key in old.timings if key in new.timings and key[1] in EVERY_SDPA_FORM]
    machine = Machine(other_card=other_card, cards=cards)
    short = [
        machine.corrected(new.timings[key]).median_us - old.timings[key].median_us
        for key in common
        if key[1] == "sdpa_core" and old.timings[key].median_us < SHORT_US
    ]
    shift = statistics.median(short) if len(short) >= FEWEST_SHORT else 0.0
    machine = Machine(shift, None, other_card, cards)
    ratios = [machine.corrected(new.timings[key]).median_us / old.timings[key].median_us for key in common]
    return Machine(shift, statistics.median(ratios) if ratios else None, other_card, cards)


def _on_the_old_card(timing: Timing, old: Run, new: Run) -> Timing:
    """Return a timing with the new card's launch floor replaced by the old one's, and the rest by the read curves."""
    cards = old.timings[timing.key].card, new.timings[timing.key].card
    before_card, after_card = old.calibration_of(cards[0]), new.calibration_of(cards[1])
    if cards[0] == cards[1] or before_card is None or after_card is None:
        return timing
    (old_floor, old_curve), (new_floor, new_curve) = before_card, after_card
    factor = 1.0
    if timing.bytes:
        before = limit_us(timing.bytes, old_curve) - old_floor
        after = limit_us(timing.bytes, new_curve) - new_floor
        factor = before / after if before > 0 and after > 0 else 1.0
    return timing.shifted(-new_floor).scaled(factor).shifted(old_floor)
