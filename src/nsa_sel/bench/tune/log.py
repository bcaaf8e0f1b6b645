"""What a sweep has measured so far, on disk, and how long the rest will take."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ...kernel import tuned_table
from ...kernel.launch_config import LaunchConfig
from ..suite.cases import Case


class Log:
    """Keep every measurement as a line of a file that is only ever appended to; read it back when it is opened.

    Only lines of the same kernel, GPU and versions count, and none from before a sweep that was finished. A line cut
    off by an interruption is left where it is.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], beside: Path | None = None) -> None:
        """beside: another log, which is read before this one and not written to."""
        about = {"schema": tuned_table.SCHEMA, "kernel": tuned_table.kernel_hash(), **machine}
        self.run = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self.path = path
        self._times: dict[tuple[str, str, LaunchConfig], float] = {}
        self._errors: dict[tuple[str, LaunchConfig], str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if beside is not None:
            self._read(beside)
        text = self._read(path)
        self.found = len(self._times) + len(self._errors)
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")
        if not self.found:
            self._write({"about": about})

    def _read(self, path: Path) -> str:
        """Take over what is in a file, and return its text."""
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            self._take(line)
        return text

    def absorb(self, path: Path) -> None:
        """Append what another log holds, and delete that."""
        text = self._read(path)
        self._file.write(text if text.endswith("\n") else f"{text}\n")
        self._file.flush()
        path.unlink()
        self.found = len(self._times) + len(self._errors)

    def _take(self, line: str) -> None:
        try:
            record = json.loads(line)
            if record["run"] != self.run or "about" in record:
                return
            if record.get("finished"):
                self._times.clear()
                self._errors.clear()
                return
            case, launch = record["case"], LaunchConfig(**record["launch"])
            if record["error"] is None:
                self._times[record["round"], case, launch] = float(record["us"])
            else:
                self._errors[case, launch] = str(record["error"])
        except (ValueError, KeyError, TypeError):
            return

    def time_us(self, stage: str, case: Case, launch: LaunchConfig) -> float | None:
        """Return what a stage measured; None if it has not, or if the launch failed in any stage."""
        return None if (case.id, launch) in self._errors else self._times.get((stage, case.id, launch))

    def error(self, case: Case, launch: LaunchConfig) -> str | None:
        return self._errors.get((case.id, launch))

    def include(self, errors: Mapping[tuple[str, LaunchConfig], str]) -> None:
        """Know errors that stand in another rank's log."""
        self._errors.update(errors)

    def errors(self) -> dict[tuple[str, LaunchConfig], str]:
        """Return every error by case id and launch."""
        return dict(self._errors)

    def add(
        self, stage: str, case: Case, launch: LaunchConfig, us: float | None = None, error: str | None = None
    ) -> None:
        """Record a median in µs, or an error, which rules the launch out for the case."""
        if error is not None:
            self._errors[case.id, launch] = error
        elif us is not None:
            self._times[stage, case.id, launch] = us
        self._write({"round": stage, "case": case.id, "launch": asdict(launch), "us": us, "error": error})

    def finish(self) -> None:
        """Say that the sweep is complete: the next one measures anew."""
        self._write({"finished": True})
        self.close()

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"run": self.run, **record}) + "\n")
        self._file.flush()


class Progress:
    """Show how far a stage is and how long its rest will take: one line on a terminal, else one every few seconds."""

    def __init__(self, out: TextIO | None = None, every_s: float = 15.0) -> None:
        self.out = sys.stderr if out is None else out
        self.terminal = self.out.isatty()
        self.every_s = 0.2 if self.terminal else every_s
        self.total = self.done = 0

    def start(self, stage: str, total: int) -> None:
        """Begin a stage of `total` steps."""
        self.stage, self.total, self.done = stage, total, 0
        self.began = self.shown = time.monotonic()

    def step(self) -> None:
        """Count one step."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.shown >= self.every_s:
            self.shown = now
            left = (now - self.began) / self.done * (self.total - self.done)
            text = f"{self.bar()} {self.done}/{self.total}, {clock(left)} left: {self.stage}{self.beside()}"
            if self.terminal:
                width = shutil.get_terminal_size().columns - 1
                end = "\n" if self.done == self.total else ""
                print(f"\r{text[:width]:<{width}}", end=end, file=self.out, flush=True)
            else:
                print(text, file=self.out, flush=True)

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print a line, to standard output unless told; on a terminal the line shown makes room and comes again."""
        if self.terminal:
            print(f"\r{'':{shutil.get_terminal_size().columns - 1}}\r", end="", file=self.out, flush=True)
            self.shown = self.began  # long ago: the next step shows it
        print(text, file=file, flush=True)

    def beside(self) -> str:
        """Return what else is on the line: nothing, but under torchrun the other ranks."""
        return ""

    def bar(self, width: int = 24) -> str:
        filled = width * self.done // self.total
        return f"[{'#' * filled}{'.' * (width - filled)}]"


def clock(seconds: float) -> str:
    """Return a duration as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
