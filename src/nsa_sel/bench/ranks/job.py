"""One rank of a job: its card, the other ranks, and the messages between them.

torchrun, or any launcher that sets RANK, WORLD_SIZE and LOCAL_RANK, starts the processes. They meet in a gloo group of
torch.distributed, which compares what they run on. From then on every message goes through the group's store, one key
each: a collective would wait for a rank that died.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LIMIT_S = 600.0  # a rank that is silent for so long is given up
MEET_S = 300.0  # that all are there: imports from a slow disk
LET_GO_S = 5.0
POLL_S = 0.05
COMPILED = "compiled"  # the box of ranks that have compiled their part


class JobError(RuntimeError):
    """Say in a sentence why these processes cannot work on one job."""


def take_card() -> None:
    """Let this process and those that it starts see one card alone, by LOCAL_RANK. Before CUDA is first used."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = map(str, range(torch.cuda.device_count())) if visible is None else visible.split(",")
    if known := [card for card in cards if card.strip()]:
        os.environ["CUDA_VISIBLE_DEVICES"] = known[int(os.environ["LOCAL_RANK"]) % len(known)]


class Job:
    """Hold this process's rank among `size`. limit_s: silence after which a rank is given up."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in VARIABLES)
        self.limit_s = limit_s
        self.cards: list[dict[str, Any]] = []  # what each rank runs on
        self.restarted = False  # this process took the place of one that had met the others
        self.lost: set[int] = set()  # ranks that were given up
        self._store: Any = None
        self._next: dict[str, int] = {}  # number of the next message, by the box it will lie in
        self._noted: dict[int, tuple[bytes, float]] = {}  # each rank's last sign of life, and when it was first seen
        self._notes = 0

    @property
    def leads(self) -> bool:
        """Tell whether this is rank 0, which gathers, prints and saves."""
        return self.rank == 0

    @property
    def id(self) -> str:
        """Return a name of this job that no other has."""
        return self.cards[0]["job"]

    @property
    def can_restart(self) -> bool:
        """Tell whether a new process can take this one's place: not if the store that all use is in this one."""
        return not self.leads or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    @property
    def here(self) -> list[int]:
        """Return the ranks of this host, this one too."""
        return [rank for rank, card in enumerate(self.cards) if card["host"] == self.cards[self.rank]["host"]]

    @property
    def part(self) -> tuple[int, int]:
        """Return this rank's number among those of its host, and how many there are."""
        return self.here.index(self.rank), len(self.here)

    def meet(self, about: Mapping[str, Any], may_differ: Iterable[str] = ()) -> None:
        """Wait for all ranks, and compare what they are about: the GPU's model, versions, cases.

        Raises: JobError if they differ in anything but host and `may_differ`, or do not come.
        """
        mine = {**about, "host": socket.gethostname(), "job": secrets.token_hex(4)}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        limit = timedelta(seconds=MEET_S)
        try:
            self._store, *_ = next(dist.rendezvous("env://", timeout=limit))
            self.restarted = self._store.add(f"started/{self.rank}", 1) > 1
            if self.restarted:
                self.cards = pickle.loads(self._store.get("cards"))
                return
            group = dist.PrefixStore("gloo", self._store)
            dist.init_process_group("gloo", store=group, rank=self.rank, world_size=self.size, timeout=limit)
            cards: list[Any] = [None] * self.size
            dist.all_gather_object(cards, mine)
            self._store.set("cards", pickle.dumps(cards))
            dist.destroy_process_group()  # its threads would run beside what is timed
        except RuntimeError as error:
            raise JobError(f"the {self.size} ranks did not meet in {MEET_S:.0f} s: {error}") from None
        self.cards = cards
        for name in [name for name in mine if name not in ("host", "job", *may_differ)]:
            if difference := _difference(name, [card[name] for card in cards]):
                raise JobError(difference)

    def post(self, to: int, message: Any, box: str = "") -> None:
        """Leave a message for a rank."""
        name = f"{self.rank}>{to}{box}"
        self._store.set(f"{name}/{self._store.add(f'sent/{name}', 1)}", pickle.dumps(message))

    def messages(self, source: int, box: str = "") -> Iterator[Any]:
        """Yield the messages that have come from a rank, each once."""
        name = f"{source}>{self.rank}{box}"
        if name not in self._next:
            self._next[name] = self._store.add(f"taken/{name}", 0) + 1
        while self._store.check([key := f"{name}/{self._next[name]}"]):
            message = pickle.loads(self._store.get(key))
            self._store.delete_key(key)
            self._next[name] = self._store.add(f"taken/{name}", 1) + 1
            yield message

    def note(self, doing: str) -> None:
        """Give a sign of life: what this rank is about to do."""
        self._notes += 1
        self._store.set(f"doing/{self.rank}", f"{self._notes} {doing}")

    def doing(self, rank: int) -> str:
        """Return what a rank said last that it was about to do; empty if it has said nothing."""
        return self._sign(rank).decode().partition(" ")[2]

    def _sign(self, rank: int) -> bytes:
        key = f"doing/{rank}"
        return self._store.get(key) if self._store.check([key]) else b""

    def silent(self, rank: int) -> bool:
        """Tell whether a rank has given no sign of life for the limit, as far as this rank has looked."""
        sign, now = self._sign(rank), time.monotonic()
        before, since = self._noted.get(rank, (None, now))
        if sign != before:
            since = now
        self._noted[rank] = sign, since
        return now - since > self.limit_s

    def listen(self, ranks: Iterable[int], hear: Callable[[int, Any], bool], box: str = "") -> list[int]:
        """Hand each message of these ranks to `hear`, until it says of each rank that this was the last.

        Returns: the ranks that were given up because they were silent.
        """
        left, lost = set(ranks), []
        while left:
            for rank in sorted(left):
                if any(hear(rank, message) for message in self.messages(rank, box)):
                    left.discard(rank)
                elif self.silent(rank):
                    lost.append(rank)
                    self.lost.add(rank)
                    left.discard(rank)
            if left:
                self.note("waits for the other ranks")
                time.sleep(POLL_S)
        return lost

    def exchange(self, ranks: Iterable[int], message: Any, box: str) -> dict[int, Any]:
        """Give each of these ranks a message and wait for theirs; return those that came, with this rank's own."""
        found = {self.rank: message}
        others = [rank for rank in ranks if rank != self.rank]
        for rank in others:
            self.post(rank, message, box)
        self.listen(others, lambda rank, theirs: found.setdefault(rank, theirs) is theirs, box)
        return found

    def let_go(self, message: Any, listening: Iterable[int]) -> None:
        """Give all ranks their last message, and wait until those who listen have it: the store may be in this process.

        Only rank 0 does.
        """
        for rank in self.others:
            self.post(rank, message)
        left, end = set(listening) - self.lost, time.monotonic() + LET_GO_S
        while left and time.monotonic() < end:
            left = {of for of in left if self._store.add(f"taken/0>{of}", 0) < self._store.add(f"sent/0>{of}", 0)}
            time.sleep(POLL_S if left else 0)

    def described(self, rank: int) -> str:
        """Say which card a rank has."""
        card = self.cards[rank]
        return f"rank {rank} on {card['gpu'] or 'the CPU'}" + (f" {card['gpu_id']}" if card["gpu_id"] else "")

    @property
    def sharing(self) -> bool:
        """Tell whether several ranks have the same card, so that no time of theirs is a figure."""
        known = [(card["host"], card["gpu_id"]) for card in self.cards if card["gpu"] is not None]
        return len(set(known)) < len(known)


def _difference(name: str, values: list[Any]) -> str:
    """Say in a sentence how ranks differ; empty if they do not."""
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return ""
    said = f"{name} is {values[0]} on rank 0, {values[other]} on rank {other}"
    if name == "gpu":
        said += "; start one job for each model, with its cards in CUDA_VISIBLE_DEVICES"
    return said
