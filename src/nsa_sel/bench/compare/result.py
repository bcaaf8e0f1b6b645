"""What a comparison found, and its text: the roll-up first, then the worst, the verdict last."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..saved.run import IDENTITY, Key, Run
from ..saved.speedups import TRITON
from ..tables import printable
from .yardstick import SAID_SHIFT_US, Machine

SHOWN = 10  # lines of a list
FAMILY_SLOWER = 1.03  # a family's geomean from which the verdict names it
RED, GREEN, YELLOW = 31, 32, 33


@dataclass(frozen=True)
class Change:
    """Hold one case that changed; `change` is the judged slow-down as a fraction, 0.15 being 15 % slower."""

    case: str
    method: str
    old_us: float
    new_us: float
    change: float
    speedups: tuple[float, float] | None = None  # old and new, where the speed-up over SDPA was judged
    note: str = ""
    again_us: float | None = None  # measured again; the change is then this one's
    family: str = ""

    @property
    def key(self) -> Key:
        return self.case, self.method

    def text(self) -> str:
        """Return one line: case, method, both times, the change, and what else there is to know."""
        parts = [f"{self.case} {self.method}  {self.old_us:.2f} us -> {self.new_us:.2f} us"]
        if self.again_us is not None:
            parts.append(f"again {self.again_us:.2f} us")
        if self.speedups:
            parts.append(f"speed-up {self.speedups[0]:.2f}x -> {self.speedups[1]:.2f}x")
        parts.append(f"{self.change * 100:+.1f} %")
        return printable("  ".join([*parts, self.note] if self.note else parts))


@dataclass(frozen=True)
class RollUp:
    """Hold how a family changed in one scope: the geomean of new / old time, and its 95 % interval over the cases."""

    family: str
    scope: str
    cases: int
    ratio: float
    interval: tuple[float, float] | None  # None: of fewer than three cases
    kernel: str = TRITON["op"]

    @property
    def name(self) -> str:
        """Return the family, with the kernel where it is a user's."""
        return self.family if self.kernel == TRITON["op"] else f"{self.kernel} {self.family}"

    @property
    def slower(self) -> bool:
        """Tell whether the family as a whole is slower by more than runs of one commit differ."""
        return self.ratio > FAMILY_SLOWER and self.interval is not None and self.interval[0] > 1

    def text(self) -> str:
        """Return scope, ratio, interval and count."""
        interval = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
        return f"{self.scope} {self.ratio:.3f}x{interval} of {self.cases}"


@dataclass(frozen=True)
class Comparison:
    """Hold what was found between two runs."""

    old: Run
    new: Run
    compared: int  # timings of the kernel
    machine: Machine = Machine()
    regressions: tuple[Change, ...] = ()  # confirmed: slower by the whole rule, or again when measured again
    suspects: tuple[Change, ...] = ()  # beyond the noise, but not by the whole rule
    improvements: tuple[Change, ...] = ()
    noise: tuple[Change, ...] = ()
    same: tuple[Change, ...] = ()  # neither slower nor faster
    cleared: tuple[Change, ...] = ()  # looked slower, and were not when measured again
    warnings: tuple[Change, ...] = ()  # call time and graph time
    missing: tuple[Key, ...] = ()
    new_cases: tuple[Key, ...] = ()
    roll_up: tuple[RollUp, ...] = ()
    part: tuple[int, int] | None = None  # cases of the new run, and of the old one, if the new is a part of it
    assumed_noise: str = ""  # the card whose noise was taken, where this one's is not known

    @property
    def different_gpu(self) -> bool:
        return self.old.gpu != self.new.gpu

    @property
    def references_only(self) -> bool:
        """Tell whether both runs are without a GPU: they time references, and users' kernels, by the wall clock."""
        return not self.old.on_gpu and not self.new.on_gpu

    @property
    def sdpa_ratio(self) -> float | None:
        return self.machine.sdpa_ratio

    @property
    def moved(self) -> bool:
        return self.machine.moved

    @property
    def exit_code(self) -> int:
        """Return 0: pass, or no verdict; 1: confirmed, missing, nothing in common, other GPU; 3: only suspects."""
        if self.references_only:
            return 0
        if self.different_gpu or not self.compared or self.regressions or self.missing:
            return 1
        return 3 if self.suspects else 0

    @property
    def verdict(self) -> str:
        """Return the verdict in one line."""
        if self.references_only:
            return f"{'no GPU' if self.new.kernels else 'references only'}: no verdict"
        if self.different_gpu:
            return "FAIL, different GPU"
        faults = [] if self.compared else ["no case in common"]
        counts = (len(self.regressions), "slower"), (len(self.missing), "missing"), (len(self.suspects), "suspect")
        faults += [f"{count} {what}" for count, what in counts if count]
        if self.exit_code == 1:
            return f"FAIL, {', '.join(faults)}{self._assumed()}"
        if not self.machine.judged:
            return "another card: not judged"
        slower = "; ".join(f"{part.name} {part.text()}" for part in self.roll_up if part.slower)
        if self.suspects:
            said = f"SUSPECT, {', '.join(faults)}: to be measured again"
        else:
            said = "pass, no case is over 10 %" if slower else "pass, nothing got slower"
        return said + (f"; as a whole slower: {slower}" if slower else "") + self._assumed()

    def _assumed(self) -> str:
        return f" (noise of {self.assumed_noise} assumed)" if self.assumed_noise else ""

    def text(self, colour: bool = False) -> str:
        """Return the whole result as plain text of printable characters, or with the verdict's colour."""
        lines = [f"nsa_sel: {describe(self.old)} -> {describe(self.new)}"]
        lines.append(f"{self.compared} timings compared, {len(self.new_cases)} new, {len(self.missing)} missing")
        lines += self.circumstances()
        lines += self._families()
        lines += section("REGRESSIONS", [change.text() for change in self.regressions], by_family(self.regressions))
        lines += section("SUSPECT", [change.text() for change in self.suspects], by_family(self.suspects))
        if self.suspects and self.new.path:
            lines.append(f"  measure again on this GPU: {self.command_again()}")
        lines += section("MISSING: asked for and not measured", [" ".join(key) for key in self.missing])
        lines += section("improvements", [change.text() for change in self.improvements])
        lines += section("measured again, not slower", [change.text() for change in self.cleared])
        if self.noise:
            lines.append(
                f"noise ({len(self.noise)}): slower by more than 10 %, and by no more than runs of one commit differ"
            )
        lines += self._warnings()
        lines += section("new, not judged", [" ".join(key) for key in self.new_cases])
        return "\n".join([*map(printable, lines), self.last_line(colour)])

    def last_line(self, colour: bool = False) -> str:
        """Return the verdict as the text's last line."""
        line = printable(f"verdict: {self.verdict}")
        shade = {0: GREEN, 1: RED, 3: YELLOW}[self.exit_code]
        return f"\x1b[{shade}m{line}\x1b[0m" if colour else line

    def command_again(self) -> str:
        """Return the command that measures the suspects again."""
        runs = (shlex.quote(run.path or run.name) for run in (self.old, self.new))
        return f"nsa-sel compare {' '.join(runs)} --again"

    def circumstances(self) -> list[str]:
        """Return what else differs between the two runs, a line each."""
        before, after = self.old.environment, self.new.environment
        lines = [
            f"environment changed: {field} {before[field]} -> {after[field]}"
            for field in IDENTITY
            if field not in ("gpu", "gpu_id") and before[field] != after[field]
        ]
        if self.different_gpu:
            lines.append(f"DIFFERENT GPU: {self.old.gpu} -> {self.new.gpu}: the times cannot be compared")
        else:
            lines += self._machine()
        if self.part:
            lines.append(f"a part: the new run has {self.part[0]} of the old run's {self.part[1]} cases")
        if self.old.random != self.new.random:
            drawn = (", ".join(f"{k} {v}" for k, v in run.random.items()) or "none" for run in (self.old, self.new))
            lines.append(f"note: other random cases: {' -> '.join(drawn)}")
        kernels = self.old.kernels, self.new.kernels
        lines += [f"note: {name} is measured in the old run alone" for name in kernels[0] if name not in kernels[1]]
        lines += [
            f"note: {name} is {what} in the new run and {kernels[0][name]} in the old one"
            for name, what in kernels[1].items()
            if kernels[0].get(name, what) != what
        ]
        lines += [f"note: {run.name} was cut short and lacks cases" for run in (self.old, self.new) if run.interrupted]
        shared = [run.name for run in (self.old, self.new) if run.shared_cards]
        lines += [f"note: ranks of {name} shared a card, so that its times are no figures" for name in shared]
        if self.old.regressions:
            lines.append(f"note: the old run was saved with {len(self.old.regressions)} confirmed regressions")
        return lines

    def _machine(self) -> list[str]:
        lines, shift = [], self.machine.shift_us
        if self.machine.other_card:
            how = "calibration taken off" if self.machine.judged else "without calibration, so that it is not judged"
            cards = f"{self.old.environment['gpu_id']} -> {self.new.environment['gpu_id']}"
            lines.append(f"another card of the same name: {cards}, {how}")
        if abs(shift) > SAID_SHIFT_US:
            taken = "taken off" if self.machine.taken_off_us else "too much to be taken off"
            way = "longer" if shift > 0 else "less"
            lines.append(f"launch floor: every call takes {abs(shift):.2f} us {way}, SDPA's too; {taken}")
        if self.moved:
            lines.append(
                f"environment shift: the SDPA cases take {self.sdpa_ratio or 1:.3f}x of their old time (median);"
                " Triton cases with an SDPA partner are judged by their speed-up"
            )
        return lines

    def _families(self) -> list[str]:
        """Return a line per family: how it changed in each scope."""
        names = dict.fromkeys(part.name for part in self.roll_up)
        lines = [
            f"  {name:<8} " + "; ".join(part.text() for part in self.roll_up if part.name == name) for name in names
        ]
        return ["new / old time, geomean [95 % interval] of cases:", *lines] if lines else []

    def _warnings(self) -> list[str]:
        """Return a line per kind of time."""
        kinds: dict[str, list[Change]] = {}
        for change in self.warnings:
            kinds.setdefault(change.note, []).append(change)
        return [f"warning: {kind} rose in {len(of)} cases, worst {of[0].text()}" for kind, of in kinds.items()]


def describe(run: Run) -> str:
    """Return a run's name and date."""
    return f"{run.name} ({run.datetime[:16]})" if run.datetime else run.name


def by_family(changes: Iterable[Change]) -> str:
    """Return how many of the changes are of which family."""
    return ", ".join(f"{family} {count}" for family, count in Counter(c.family for c in changes).most_common())


def section(title: str, lines: Sequence[str], counts: str = "") -> list[str]:
    """Return a titled, indented list, cut after ten lines, with its counts if it is cut; nothing if there are none."""
    if not lines:
        return []
    cut = lines[:SHOWN]
    more = [f"  ... and {len(lines) - len(cut)} more" + (f"; {counts}" if counts else "")] if len(lines) > SHOWN else []
    return [f"{title} ({len(lines)})", *(f"  {line}" for line in cut), *more]
