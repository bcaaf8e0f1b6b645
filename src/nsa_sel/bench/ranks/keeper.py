"""The journals of a job of several ranks: each keeps what it measures, and rank 0 saves the whole as one run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ..resume.conditions import differences
from ..resume.keeper import Keeper
from ..saved import journal
from ..saved.run import Key, RunError, read_json
from .job import Job

HELD = "held"  # the box of what rank 0 says that earlier jobs have measured


class RankKeeper(Keeper):
    """Keep one rank's results; on rank 0 all of them.

    owner: the rank of every case.
    """

    def __init__(self, job: Job, owner: Mapping[str, int], config: pytest.Config, pairs: Mapping[str, Key]) -> None:
        super().__init__(config, pairs)
        self.job, self.owner = job, owner

    def _journal_name(self) -> str:
        return f"{super()._journal_name()}-rank{self.job.rank}"

    @functools.cached_property
    def _conditions(self) -> dict[str, Any]:
        """Return the conditions but for the card: ranks have several, and each result says its own."""
        return {**super()._conditions, "gpu_id": None, "many ranks": True}

    def _head(self) -> dict[str, Any]:
        return {**super()._head(), "job": self.job.id}

    def notes(self) -> dict[str, Any]:
        """Return what a saved run says of the job too; of a job of one rank there is nothing to say."""
        notes = super().notes()
        if self.job.size > 1:
            names = ("host", "gpu_id", "calibration")
            notes["ranks"] = [{name: card.get(name) for name in names} for card in self.job.cards]
        if self.job.sharing:
            notes["shared_cards"] = True
        return notes

    def resume(self) -> None:
        """Take over what the ranks of the newest job of this very run have left; rank 0 reads, and tells the others.

        Raises: pytest.UsageError saying what differs, if there are only journals of other runs.
        """
        if not self.job.leads:
            self.job.listen([0], self._hear_what_is_held, HELD)
            return
        said: list[Key] | str = []
        try:
            said = self._take_over(*self._left())
        except pytest.UsageError as error:
            said = str(error)
            raise
        finally:
            for rank in self.job.others:
                self.job.post(rank, said, HELD)

    def _hear_what_is_held(self, _: int, said: list[Key] | str) -> bool:
        if isinstance(said, str):
            raise pytest.UsageError(said)
        self.held = set(said)
        return True

    def _left(self) -> tuple[list[Path], list[dict[str, Any]]]:
        """Return the journals of the newest job of this run, the oldest first."""
        found: dict[Path, dict[str, Any]] = {}
        refused, job = "", None
        for path in journal.left_in(self.folder()):
            try:
                left = read_json(path)
            except RunError as error:
                self.say(str(error))
                continue
            if differs := differences(left, self._conditions, self.asked()):
                refused = refused or f"{path.name} is of another run: {differs}"
            elif job in (None, left.get("job")):
                job = left.get("job")
                found = {path: left, **found}
        if refused and not found:
            raise pytest.UsageError(f"--sel-resume: {refused}; leave the option out to measure anew")
        return list(found), list(found.values())

    def _take_over(self, paths: list[Path], left: list[dict[str, Any]]) -> list[Key]:
        """Copy the results into rank 0's journal, delete those that they are from, and return whose they are."""
        if not paths:
            self.say(f"no run that ended early in {self.folder()}: all is measured")
            return []
        found = {pair: bench for each in left for pair, bench in self._results(each)}
        found = {pair: bench for pair, bench in found.items() if self._stays(pair[0], bench, found)}
        self._parts = [name for each in left for name in each["partial"]]
        self.held = set(found)
        self.benchmarks.benchmarks += found.values()
        self.take()
        self._new = 0
        if self._journal is None or self._journal.complete:
            for path in paths:
                path.unlink(missing_ok=True)
        names = ", ".join(path.name for path in paths)
        self.say(f"goes on with {names}: {len(found)} of {len(self.pairs)} benchmarks are in them")
        return list(found)

    def _stays(self, case: str, bench: Any, found: Mapping[Key, Any]) -> bool:
        """Tell whether a result is of the card that measures the rest of its case, if there is a rest."""
        whole = all(pair in found for pair in self.pairs.values() if pair[0] == case)
        return whole or bench.extra_info.get("gpu_id") == self.job.cards[self.owner[case]]["gpu_id"]

    def add(self, test: str, benchmarks: list[Any]) -> None:
        """Journal another rank's results of a test."""
        self.benchmarks.benchmarks += benchmarks
        self.take()
        self.ran.add(test)

    def save(self) -> None:
        if self.job.leads:
            super().save()
        self.settled = True

    @property
    def safe(self) -> bool:
        """Tell whether all that was gathered is on disk, so that the other ranks need not keep it."""
        return self._journal is None or self._journal.complete or bool(self.saved and not self.fault)

    def release(self) -> None:
        """Delete this rank's journal: rank 0 has what is in it."""
        if self._journal is not None:
            self._journal.remove()

    def _others(self) -> list[Path]:
        return [path for path in super()._others() if not self._of_this_job(path)]

    def _of_this_job(self, path: Path) -> bool:
        try:
            return read_json(path).get("job") == self.job.id
        except RunError:
            return False
