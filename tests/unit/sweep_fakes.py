"""Stand-ins for a sweep's GPU and compiler, and the cases and launches that its tests share."""

import random
from collections import Counter
from dataclasses import asdict

from nsa_sel.bench.methods.contender import NotTimed, WrongResult
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.cases import rows_case
from nsa_sel.kernel.call import Gpu
from nsa_sel.kernel.launch_config import LaunchConfig

H200 = Gpu("NVIDIA H200", 132, 232_448, True, True)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 128, 101_376, False, False)
FEW, MANY, MIXED = (rows_case("bf16", layout, 8, 128, 128, 64, 1024) for layout in ("few", "many", "mixed"))
DECODE = cases.decode_case("bf16", "many", 16, 128, 128, 1024, 1, 8192)
UNTUNED = LaunchConfig("gather", 64, 128, 128, 4, 2)
BEST = LaunchConfig("gather", 32, 128, 64, 2, 3)  # a narrower chunk: not in the first round
MACHINE = {"gpu": H200.name, "torch": "2.11.0"}


class FakeBench:
    """Time launches by a rule: 10 µs for BEST, more for each field that differs; some launches fail as a test wants."""

    def __init__(self, stop_after=None):
        self.checked, self.sampled, self.opened = Counter(), Counter(), []
        self.wrong, self.slow, self.no_room, self.breaks = set(), {}, set(), None
        self.stop_after, self.is_alive = stop_after, True
        self.noise = random.Random(0)

    def untuned(self, case):
        return UNTUNED

    def open(self, case):
        if case in self.no_room:
            raise NotTimed("needs 99.0 GB, 9.0 GB are free")
        self.opened.append(case)

    def check(self, launch):
        case = self.opened[-1]
        self.checked[case, launch] += 1
        if launch in self.wrong:
            raise WrongResult("MAE 0.1\n2 of 64 rows are bad")
        if launch == self.breaks:
            self.is_alive = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def samples(self, launch, rounds, warmup):
        case = self.opened[-1]
        self.sampled[case, launch] += 1
        if self.stop_after is not None and sum(self.sampled.values()) > self.stop_after:
            raise KeyboardInterrupt
        return [self.us(case, launch) * self.noise.uniform(0.999, 1.001) for _ in range(rounds)]

    def us(self, case, launch):
        fields = asdict(launch)
        return self.slow.get((case, launch), 10 + sum(fields[name] != value for name, value in asdict(BEST).items()))

    def alive(self):
        return self.is_alive


class FakeCompiler:
    def __init__(self, broken=()):
        self.broken, self.compiled = set(broken), []

    def __call__(self, variants, finished):
        self.compiled += variants
        for _ in variants:
            finished()
        return {v: "PTXASError: out of luck" for v in variants if v.launch in self.broken}
