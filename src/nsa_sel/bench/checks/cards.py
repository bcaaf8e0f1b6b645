"""Predict, for GPUs that nobody here has: launches, what the compiler makes of them, read limits, skips and durations.

Writes the tables between the page's markers. Nothing in them was timed on these GPUs. Needs Triton >= 3.4.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import triton

from ...kernel import rules, tuned_table
from ...kernel.call import Gpu
from ...kernel.launch_config import LaunchConfig
from .. import parallel
from ..command_line import Parser, exit_code
from ..decide.command import FULL_RUN_S
from ..saved import storage
from ..saved.run import read_json
from ..suite import cases
from ..suite.cases import Case
from ..suite.inputs import memory_estimate
from ..tables import as_markdown, replace_file
from ..tune import space
from ..tune.log import Log, Progress
from ..tune.sweep import Sweep, SweepDevice
from . import aot
from .variants import ARCHITECTURES, chosen

BEGIN, END = "<!-- predicted: begin -->", "<!-- predicted: end -->"
GIB = 2**30
NOT_FREE = GIB  # of a GPU's memory: CUDA's context, a desktop
CORES = 16  # of the host that the durations are for
BENCHMARKS, H200_GBPS = 3356, 4800.0  # of the full runs on an H200, and its bandwidth by its data sheet
# The read limit as a line: time = floor + bytes / (share of the nominal bandwidth). Within 4 % of their calibrations.
READ_FLOOR_US, READ_SHARE = 3.84, 0.968


@dataclass(frozen=True)
class Card:
    """Describe a GPU by its vendor's data sheet. memory: GiB. gbps: nominal bandwidth, GB/s."""

    name: str
    arch: int
    memory: int
    gbps: float
    sm_count: int

    @property
    def gpu(self) -> Gpu:
        known = ARCHITECTURES[self.arch][1]
        return Gpu(self.name, self.sm_count, known.shared_bytes, known.has_tma, known.has_clusters)

    @property
    def slower(self) -> float:
        """Return how many times longer than the H200 it takes to read something large."""
        return max(1.0, H200_GBPS / self.gbps)


SHOWN = (
    Card("RTX 4090", 89, 24, 1008, 128),
    Card("A100 80 GB", 80, 80, 2039, 108),
    Card("H100 80 GB", 90, 80, 3350, 132),
)
# For memory and durations only: a card of 16 GB, and the H200 itself, whose line can be checked.
SIZES = (Card("RTX 4080", 89, 16, 716.8, 76), *SHOWN, Card("H200", 90, 139, H200_GBPS, 132))


@dataclass(frozen=True)
class Limits:
    """Hold what an SM has. Source: CUDA programming guide, technical specifications by compute capability."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65_536


LIMITS = {80: Limits(64, 32, 164 * 1024), 89: Limits(48, 24, 100 * 1024), 90: Limits(64, 32, 228 * 1024)}
RESERVED_SHARED = 1024  # of each program, by the system
NAMED = (
    "rows-bf16-H8-D128-Dv128-L64-N64-few",
    "rows-bf16-H8-D128-Dv128-L64-N1024-many",
    "rows-bf16-H8-D128-Dv128-L256-N256-few",
    "rows-bf16-H8-D128-Dv128-L1024-N1024-mixed",
    "decode-bf16-H16-D128-Dv128-L1024-N4-t8192-many",
    "decode-bf16-H16-D128-Dv128-L1024-N256-t8192-many",
    "long-bf16-H16-D128-Dv128-L65536-N4-few",
    "prefill-bf16-H16-D128-Dv128-L1024-N16384-S4096-many",
)


def programs_per_sm(arch: int, num_warps: int, registers: int, shared_bytes: int) -> tuple[int, str]:
    """Return how many programs an SM holds at once, and what limits their number."""
    has = LIMITS[arch]
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given to a warp in units of 256
    room = {
        "registers": has.registers // (of_a_warp * num_warps),
        "shared memory": has.shared_bytes // (shared_bytes + RESERVED_SHARED),
        "warps": has.warps // num_warps,
        "programs": has.programs,
    }
    least = min(room, key=lambda what: room[what])
    return room[least], least


def read_limit_us(n_bytes: int, gbps: float) -> float:
    """Predict what a GPU takes to read so many bytes, cold."""
    return READ_FLOOR_US + n_bytes / (READ_SHARE * gbps) / 1e3


def launch_tables(bytes_of: Mapping[str, int]) -> list[str]:
    """Compile the launch of each named case for each GPU, and return a table per GPU; raises RuntimeError if one fails.

    bytes_of: by case id.
    """
    by_id = cases.by_id()
    variants = {
        (card, name): chosen(card.arch, "bf16", space.call_of(by_id[name]), card.gpu)
        for card in SHOWN
        for name in NAMED
    }
    builds = {build.variant: build for build in aot.build_all(dict.fromkeys(variants.values()), os.cpu_count() or 1)}
    blocks = []
    for card in SHOWN:
        lines = [["case", "rows per SM", "launch", "registers", "spilled", "shared", "programs per SM", "read limit"]]
        for name in NAMED:
            build = builds[variants[card, name]]
            if build.problem:
                raise RuntimeError(f"{build.variant}: {build.problem}")
            launch = rules.choose(space.call_of(by_id[name]), card.gpu)
            n, limit = programs_per_sm(card.arch, launch.num_warps, build.registers, build.shared_bytes)
            busy = 100 * n * launch.num_warps // LIMITS[card.arch].warps
            lines.append(
                [
                    f"`{name}`",
                    f"{by_id[name].N / card.sm_count:.3g}",
                    f"`{launch}`",
                    str(build.registers),
                    f"{build.spill_bytes} B",
                    f"{build.shared_bytes / 1024:.1f} KiB",
                    f"{n} ({busy} % of the warps), by {limit}",
                    "–" if by_id[name].S > 1 else f"{read_limit_us(bytes_of[name], card.gbps):.1f} µs",
                ]
            )
        about = f"{card.sm_count} SMs, {card.gbps:g} GB/s, {card.gpu.shared_bytes // 1024} KiB for one program"
        blocks.append(f"### {card.name} (sm_{card.arch}, {about}), predicted\n\n{as_markdown(lines)}")
    return blocks


def sizes_table(shown: Sequence[Card] = SIZES) -> str:
    """Return the table of what does not fit, and of how long a full run and `make decide` take."""
    full = cases.matrix("full")
    lines = [
        [
            "GPU",
            "memory",
            "cases whose packed rows do not fit",
            "benchmarks",
            "parity",
            "a full run",
            "the tiles",
            "`make decide`",
        ]
    ]
    for card in shown:
        free = card.memory * GIB - NOT_FREE
        without = [case for case in full if memory_estimate(case) > free]
        n = BENCHMARKS - sum(len(case.methods) - 1 for case in without)  # the kernel itself packs nothing
        run = [FULL_RUN_S * n / BENCHMARKS * factor for factor in (1.0, card.slower)]
        sweep = planned(card)
        tune = [sweep.expected_seconds(CORES, factor) for factor in (1.0, card.slower)]
        parity = [parallel.expected_seconds(parallel.affordable(free, CORES))] * 2
        decide = [right + tiles + 2 * one for right, tiles, one in zip(parity, tune, run, strict=True)]
        durations = map(_minutes, (parity, run, tune, decide))
        lines.append([card.name, f"{card.memory} GiB", str(len(without)), str(n), *durations])
    return as_markdown(lines)


class _Untuned:
    """Stand in for the device of a sweep that is only planned."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def untuned(self, case: Case) -> LaunchConfig:
        return rules.choose(space.call_of(case), self.gpu)


def planned(card: Card) -> Sweep:
    """Return the sweep that `make decide` begins with on this GPU, as far as it can be planned without one."""
    nowhere = Log(Path(os.devnull), {})
    nowhere.close()
    return Sweep(cases.matrix("hot"), card.gpu, cast(SweepDevice, _Untuned(card.gpu)), nowhere, Progress())


def _minutes(seconds: Sequence[float]) -> str:
    low, high = (round(each / 60) for each in seconds)
    return f"{low} min" if low == high else f"{low} to {high} min"


def largest() -> list[str]:
    """Return a line for each of the cases that need the most memory."""
    by_need = sorted(cases.matrix("full"), key=memory_estimate, reverse=True)[:4]
    return [
        f"- `{case.id}`: {memory_estimate(case) / 1e9:.1f} GB with its rows packed, "
        f"{memory_estimate(case, packed=False) / 1e9:.1f} GB without"
        for case in by_need
    ]


def made_by() -> str:
    """Return the line that says what the compiled figures depend on."""
    return f"Compiled by Triton {triton.__version__}, from the kernel {tuned_table.kernel_hash()}."


def page(text: str, compiled: Sequence[str]) -> str:
    """Return the page with what stands between its markers replaced. compiled: `launch_tables`."""
    computed = ["## Launches", made_by(), *compiled, "## Memory and durations", sizes_table(), "\n".join(largest())]
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n\n".join(computed) + f"\n\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page; return 0, or 1 if a launch does not compile."""
    command = f"python -m {__package__}.cards"
    parser = Parser(
        command, description=__doc__, examples=f"{command} docs/cards.md   about a minute on two cores; needs no GPU"
    )
    parser.add_argument("page", type=Path, help="the Markdown file, with its markers")
    parser.add_argument("--run", default="0001_baseline", help="the run that knows each case's bytes")
    args = parser.parse_args(argv)
    saved = read_json(storage.find(args.run, storage.folder(str(storage.STORAGE))))
    try:
        compiled = launch_tables({of["case"]: of["bytes"] for of in (e["extra_info"] for e in saved["benchmarks"])})
    except RuntimeError as error:
        print(f"cards: {error}", file=sys.stderr)
        return 1
    replace_file(args.page, page(args.page.read_text(encoding="utf-8"), compiled))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
