"""What a run has measured so far, on disk: a file that is only ever appended to, one line per result.

Its first line is the run as it would be saved, without its benchmarks; every other line is a benchmark, or the name of
a file in which the results so far were saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

SUFFIX = ".journal"
SYNC_S = 1.0  # what the machine's own fall may cost; a killed process loses no line


class Journal:
    """Append the lines of one run to its file.

    A fault of the disk raises nothing: lines that could not be written are kept, and tried again with the next one.
    """

    def __init__(self, path: Path, file: int | None = None, lines: bytes = b"") -> None:
        self.path = path
        self.fault = ""  # why the last attempt to write failed
        self._file = file
        self._lines = bytearray(lines)
        self._written = len(lines)
        self._synced = 0.0

    @classmethod
    def begin(cls, folder: Path, name: str, first: bytes) -> Journal:
        """Make the journal of a new run: a new file in `folder`, hidden, and named like the run."""
        journal = cls(folder / f".{name}{SUFFIX}")
        journal.add(first)
        return journal

    @classmethod
    def reopen(cls, path: Path) -> Journal:
        """Go on with a journal that an earlier run left.

        Raises: OSError if it cannot be read or written.
        """
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        _lock(file)
        journal = cls(path, file, path.read_bytes())
        if not journal._lines.endswith(b"\n"):
            journal._lines += b"\n"
        return journal

    def add(self, line: bytes) -> None:
        """Append a line, and see that it leaves this process."""
        self._lines += line + b"\n"
        self.write()

    def write(self) -> None:
        """Write what is not in the file yet, and set `fault`."""
        try:
            if self._file is None:
                self._file = self._open()
            while not self.complete:
                self._written += os.write(self._file, self._lines[self._written :])
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            self.fault = str(error)
        else:
            self.fault = ""

    @property
    def complete(self) -> bool:
        """Tell whether every line is in the file."""
        return self._written == len(self._lines)

    def rescue(self) -> Path:
        """Write every line to a new file in the folder for temporary files, and return its path.

        Raises: OSError.
        """
        file, name = tempfile.mkstemp(prefix="nsa-sel-", suffix=SUFFIX)
        with os.fdopen(file, "wb") as out:
            out.write(self._lines)
        return Path(name)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def remove(self) -> None:
        """Delete the file: the run is saved."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        wanted = self.path
        for number in count(2):
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            except FileExistsError:  # of a run that ended early, whose results are nowhere else
                self.path = wanted.with_name(f"{wanted.stem}-{number}{SUFFIX}")
            else:
                _lock(file)
                return file
        raise AssertionError


def _lock(file: int) -> None:
    """Lock a journal for as long as this process lives, so that no other run goes on with it."""
    with contextlib.suppress(ImportError, OSError):  # not everywhere, and not on every network file system
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(path: Path) -> bool:
    """Tell whether the run of a journal is still alive."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def left_in(folder: Path) -> list[Path]:
    """Return the journals of runs that ended early, the newest first."""
    try:
        found = {path: path.stat().st_mtime for path in folder.glob(f"*{SUFFIX}") if path.is_file()}
    except OSError:
        return []
    return sorted((path for path in found if not in_use(path)), key=lambda path: found[path], reverse=True)


def parse(text: str) -> dict[str, Any]:
    """Return a journal as the saved run that it stands for, and under `partial` the files that hold some of it.

    A line that was cut off is left out, and of a benchmark that stands twice the last one counts.

    Raises: ValueError if the first line is damaged.
    """
    first, *lines = text.split("\n")
    run = json.loads(first)
    if not isinstance(run, dict):
        raise ValueError("not a journal")
    benchmarks: dict[str, Mapping[str, Any]] = {}
    partial: list[str] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        if isinstance(record.get("fullname"), str):
            benchmarks[record["fullname"]] = record
        elif isinstance(record.get("partial"), str):
            partial.append(record["partial"])
    return {**run, "benchmarks": list(benchmarks.values()), "partial": partial}
