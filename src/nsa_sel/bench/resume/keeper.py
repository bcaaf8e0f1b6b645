"""Keep what a perf run has measured, however the run ends, and go on from there.

Source: docs/measuring.md, A run that ends early.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ..saved import journal, storage
from ..saved.journal import Journal
from ..saved.run import MARK, Key, RunError, gpu_name, read_json
from ..suite.chosen import notes_of
from ..timer.machine import environment
from .conditions import conditions, differences
from .results import dumps, pair_of, rebuilt


class Keeper:
    """Journal the results of a session that will be saved, and save them when it ends."""

    def __init__(self, config: pytest.Config, pairs: Mapping[str, Key]) -> None:
        self.config = config
        self.benchmarks: Any = config._benchmarksession  # type: ignore[attr-defined]
        self.pairs = pairs  # (case, method) by test, in the order of measuring
        self.ran: set[str] = set()  # tests that came to their end
        self.held: set[Key] = set()  # what an earlier run has measured
        self.stopped = False
        self.settled = False
        self.saved: list[Path] = []
        self.fault = ""  # why the run could not be saved
        self._machine = self.benchmarks.machine_id  # our comparison appends the GPU to it
        self._commit = config.hook.pytest_benchmark_generate_commit_info(config=config)  # what was imported
        self._journal: Journal | None = None
        self._rescued: Path | None = None
        self._parts: list[str] = []  # files in which earlier sessions saved a part of this run
        self._taken = self._new = 0
        self._warned = False
        self._save_all = self.benchmarks.handle_saving
        # pytest-benchmark calls this between our comparison and its own table; neither may fail because saving does.
        self.benchmarks.handle_saving = self.save

    @property
    def partial(self) -> bool:
        """Tell whether the session ended before all that it was asked for had been tried."""
        return self.stopped or len(self.ran) < len(self.pairs)

    @property
    def name(self) -> str:
        """Return the name to save under in the storage; empty if only a JSON file was asked for."""
        return str(self.benchmarks.save or self.benchmarks.autosave or "")

    @property
    def json(self) -> Path | None:
        file = self.benchmarks.json
        return None if file is None else Path(file if isinstance(file, Path) else file.name)  # a file before 5.3

    def folder(self) -> Path:
        """Return the folder in which the run will be saved, and its journal is."""
        if self.name or self.json is None:
            gpu = storage.slug(gpu_name(environment()["gpu"]))
            return Path(getattr(self.benchmarks.storage, "path", storage.STORAGE), f"{self._machine}-{gpu}")
        return self.json.absolute().parent

    @functools.cached_property
    def _conditions(self) -> dict[str, Any]:
        option = self.config.getoption
        return conditions(self._commit, option("sel_plant", None), option("sel_kernel", ()))

    def say(self, text: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"nsa_sel: {text}")

    def take(self) -> None:
        """Journal the benchmarks that were added since the last call."""
        for bench in self.benchmarks.benchmarks[self._taken :]:
            if not bench or bench.has_error or bench.fullname not in self.pairs:
                continue
            self._new += 1
            if self._journal is None:
                self._journal = Journal.begin(self.folder(), self._journal_name(), dumps(self._head()))
            self._journal.add(dumps(bench.as_dict(include_data=True)))
            if self._journal.fault and not self._warned:
                self._warned = True
                self.say(f"what is measured is not on disk before the run ends: {self._journal.fault}")
        self._taken = len(self.benchmarks.benchmarks)

    def _journal_name(self) -> str:
        return self.name or (self.json.name if self.json else "")

    def _head(self) -> dict[str, Any]:
        """Return the run as it would be saved, without its benchmarks, and what --sel-resume looks at."""
        hook = self.config.hook
        machine_info = {**self.benchmarks.get_machine_info(), **environment()}
        run = hook.pytest_benchmark_generate_json(
            config=self.config, benchmarks=[], include_data=False, machine_info=machine_info, commit_info=self._commit
        )
        return {**run, MARK: {**self.notes(), "interrupted": True}, "conditions": self._conditions}

    def notes(self) -> dict[str, Any]:
        """Return what the saved run says of what it was asked for."""
        return {"asked": self.asked(), **notes_of(self.config)}

    def asked(self) -> list[list[str]]:
        return [list(pair) for pair in self.pairs.values()]

    def resume(self) -> None:
        """Take over the results of the newest journal of this very run, if there is any journal.

        Raises: pytest.UsageError saying what differs, if there are only journals of other runs.
        """
        refused = ""
        folder = self.folder()
        for path in journal.left_in(folder):
            try:
                left = read_json(path)
            except RunError as error:
                self.say(str(error))
                continue
            differs = differences(left, self._conditions, self.asked())
            if not differs:
                self._go_on(path, left)
                return
            refused = refused or f"{path.name} is of another run: {differs}"
        if refused:
            raise pytest.UsageError(f"--sel-resume: {refused}; leave the option out to measure anew")
        self.say(f"no run that ended early in {folder}: all is measured")

    def _go_on(self, path: Path, left: Mapping[str, Any]) -> None:
        try:
            self._journal = Journal.reopen(path)
        except OSError as error:
            raise pytest.UsageError(f"--sel-resume: {path.name} cannot be written: {error}") from None
        for pair, bench in self._results(left):
            self.benchmarks.benchmarks.append(bench)
            self.held.add(pair)
        self._taken = len(self.benchmarks.benchmarks)
        self._parts = list(left["partial"])
        self.say(f"goes on with {path.name}: {len(self.held)} of {len(self.pairs)} benchmarks are in it")

    def _results(self, left: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
        """Yield what a journal holds of this run's benchmarks; a damaged one is left out, and measured again."""
        for entry in left["benchmarks"]:
            pair = self.pairs.get(entry["fullname"])
            with contextlib.suppress(KeyError, TypeError, ValueError):
                bench = rebuilt(entry)
                if pair is not None and pair == pair_of(bench):
                    yield pair, bench

    def save(self) -> None:
        """Save in the order of the cases, and delete the journal if the run is whole; a signal waits until then."""
        self.settled = True
        measured = any(bench and not bench.has_error for bench in self.benchmarks.benchmarks)
        if not measured or (self.partial and not self._new):
            return  # a file without a result helps nobody, and what was held is in the journal
        order = {name: number for number, name in enumerate(self.pairs)}
        self.benchmarks.benchmarks.sort(key=lambda bench: order.get(bench.fullname, len(order)))
        with _undisturbed():
            before = set(self._files())
            try:
                if self.name:
                    self.benchmarks.storage.default_machine_id = self.folder().name
                self._save_all()
            except Exception as error:  # whatever the disk or the storage does, the tests have passed
                self.fault = " ".join(f"{type(error).__name__}: {error}".split())
                self._delete_what_was_cut_off(before)
            else:
                self.saved = [path for path in self._files() if path not in before or path == self.json]
            self._settle()

    def _files(self) -> list[Path]:
        """Return the files that saving may have written: the JSON file, and those of this name in the storage."""
        files = [self.json] if self.json is not None else []
        if self.name:
            with contextlib.suppress(OSError):
                files += sorted(path for path in self.folder().glob("*.json") if path.stem.endswith(f"_{self.name}"))
        return files

    def _delete_what_was_cut_off(self, before: set[Path]) -> None:
        for path in self._files():
            with contextlib.suppress(OSError):
                if path.is_file() and (path not in before or path == self.json) and not _is_run(path):
                    path.unlink()

    def _settle(self) -> None:
        if self._journal is None:
            return
        if self.saved:
            for name in self._parts:
                _delete_part(self.folder() / name)
        if not self.fault and not self.partial:
            self._journal.remove()
            return
        for path in self.saved:
            if path != self.json:
                self._journal.add(dumps({"partial": path.name}))
        self._journal.write()
        if not self._journal.complete:
            with contextlib.suppress(OSError):
                self._rescued = self._journal.rescue()

    def lines(self) -> list[str]:
        """Say how the run ended, if it was not saved whole, and what of other runs is left."""
        found = []
        if self.fault:
            found.append(f"nsa_sel: NOT SAVED: {self.fault}")
        if self.partial:
            found.append(f"nsa_sel: ended early, after {len(self.ran)} of {len(self.pairs)} benchmarks; no baseline")
        if self._journal is not None and (self.fault or self.partial):
            place, again = self._journal.path, "the same command with --sel-resume goes on"
            if self._journal.complete:
                found.append(f"what was measured is in {place}; {again}")
            elif self._rescued:
                found.append(f"what was measured is in {self._rescued}; moved to {place.parent}, {again} there")
            else:
                found.append("what was measured could not be kept anywhere else")
        if self.saved and (others := self._others()):
            found.append(f"{len(others)} earlier runs that ended early left a journal, the newest {others[0]}")
        return found

    def _others(self) -> list[Path]:
        """Return the journals that other runs have left."""
        own = self._journal.path if self._journal else None
        return [path for path in journal.left_in(self.folder()) if path != own]

    def close(self) -> None:
        self.benchmarks.handle_saving = self._save_all
        if self._journal is not None:
            self._journal.close()


def _is_run(path: Path) -> bool:
    try:
        read_json(path)
    except RunError:
        return False
    return True


def _delete_part(path: Path) -> None:
    """Delete a file in which an earlier session saved a part of the run that is saved now."""
    with contextlib.suppress(RunError, OSError):
        mark = read_json(path).get(MARK)
        if isinstance(mark, Mapping) and mark.get("interrupted"):
            path.unlink()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for the moment that saving takes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
