"""Find the fastest launch for each class of calls on this GPU, and write the table that the run time reads.

Every launch that can run is compiled on all cores, checked against the oracle and timed for a few rounds; the best are
timed again with variations around them, and the finalists once more, in turns. After an interruption the same command
goes on where it stopped. With --regret no table is written: it says how far the launches that the rules choose are from
the best of a fixed grid.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernel import tuned_table
from ...kernel.call import Gpu
from ..command_line import Parser
from ..saved.storage import slug
from ..suite import case_file, cases, random_cases
from ..suite.cases import Case
from ..tables import replace_file
from ..timer.machine import environment, one_of_many
from . import regret, workers
from .log import Log, Progress
from .results import Result, as_csv, as_markdown, merged, rows
from .sweep import Compile, DeviceLost, Sweep, SweepDevice, SweepError

if TYPE_CHECKING:
    from ..ranks.job import Job

HOT_ROWS = 1024  # N of the default cases


def write(
    results: Sequence[Result], sweep: Sweep, table: Path, folder: Path, measured: Mapping[str, str]
) -> list[Path]:
    """Write tune.csv and tune.md with the finalists of every class, and the tuned table if it has an entry."""
    heading = f"Tuned launches of {sweep.gpu.name}, {measured['date']}"
    notes = [", ".join(f"{name} {value}" for name, value in measured.items() if name != "date")]
    notes += [f"- left out {n}: {reason}" for reason, n in sweep.removed.most_common()]
    notes += [f"- not measured: {case.id}: {reason}" for case, reason in sweep.skipped.items()]
    texts = {
        folder / "tune.csv": as_csv(rows(results)),
        folder / "tune.md": as_markdown(heading, results, sweep.log.errors(), notes),
    }
    tuned = merged(table, sweep.gpu.name, measured, results)
    if tuned.entries:
        texts[table] = tuned.as_json()
        set_aside(table, sweep.gpu.name)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    return list(texts)


def set_aside(table: Path, gpu: str) -> None:
    """Rename a file that stands in the table's place and is no table of this GPU, so that nothing is lost."""
    try:
        tuned_table.read(table, gpu)
    except tuned_table.TableError as error:
        if table.exists():
            taken = [table.with_name(f"{table.name}.old{n or ''}") for n in range(100)]
            kept = next(path for path in taken if not path.exists())
            table.rename(kept)
            print(f"{error}: kept as {kept}")


def default_folder(gpu: str) -> Path:
    """Return where a table goes that is written without --out: where the run time finds it, and can be written to."""
    local, packaged = tuned_table.LOCAL, tuned_table.PACKAGED
    if (local / tuned_table.file_name(gpu)).exists():  # it is read before the packaged one
        return local
    return packaged if os.access(packaged if packaged.exists() else packaged.parent, os.W_OK) else local


def select(args: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments name, but for ragged ones: their rows of one span take no entry of a table.

    With --regret all of them count, and random ones are what it is taken over where none are named.

    Raises: ValueError for an unknown family, a bad file of cases, or if none is left.
    """
    if args.sel_cases and (args.matrix or args.family):
        raise ValueError("--sel-cases: stands in place of --matrix and --family; give one of them")
    if args.json and not args.regret:
        raise ValueError("--json: is said of --regret")
    if args.regret and not (args.matrix or args.family or args.sel_cases):
        args.matrix, args.sel_count = random_cases.RANDOM, args.sel_count or regret.CASES
    given = bool(args.matrix or args.family or args.k or args.sel_cases)
    if args.sel_cases:
        chosen = case_file.read(args.sel_cases, args.dtype)
    else:
        random = args.sel_seed, args.sel_count
        chosen = random_cases.of_matrix(args.matrix or "hot", args.dtype, args.family if given else "rows", *random)
    chosen = [case for case in chosen if all(text in case.id for text in args.k) and (given or case.N == HOT_ROWS)]
    if not args.regret:
        chosen = [case for case in chosen if not (case.ragged and case.n_spans == 1)]
    if not chosen:
        raise ValueError(f"no case but ragged ones has all of these in its id: {', '.join(args.k)}")
    return chosen


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel tune` is asked with."""
    parser = Parser(
        "nsa-sel tune",
        description=__doc__,
        examples="""
            nsa-sel tune                                     the hot shape, some minutes
            nsa-sel tune --matrix full --family decode     other cases, by their ids
            nsa-sel tune --sel-cases mine.yaml               shapes of your own
            nsa-sel tune --regret --json regret.json         40 random shapes; no table""",
        epilog="exit code: 0 a table was written; 1 nothing can be tuned here; 2 bad arguments; 130 interrupted",
    )
    parser.add_argument(
        *("--matrix", "--sel-matrix"),
        choices=random_cases.MATRICES,
        help="cases to tune (default: the hot shape, N=1024 rows)",
    )
    random_cases.add_options(parser.add_argument)
    parser.add_argument("--family", metavar="NAMES", help=f"with commas, of {', '.join(cases.FAMILIES)} (default: all)")
    parser.add_argument("--sel-cases", type=Path, metavar="FILE", help="a YAML file of cases, in place of the matrix")
    parser.add_argument(
        "-k", action="append", default=[], metavar="TEXT", help="only cases with TEXT in their id (default: all)"
    )
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bf16", help="of the cases; the table serves both")
    parser.add_argument("--exhaustive", action="store_true", help="every chunk of D and Dv in the first round too")
    parser.add_argument(
        "--regret",
        action="store_true",
        help="write no table: time the launch that the rules choose beside the best of a fixed grid"
        f" (default: off; its cases: {regret.CASES} random ones)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures of --regret, with the grid")
    parser.add_argument("--top", type=int, default=4, metavar="K", help="finalists of each class")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE|DIR",
        help="the tuned table (default: tuned/ of this installation, if it can be written to, else"
        f" {tuned_table.LOCAL}/ here: the two places where the run time looks)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="tune.csv, tune.md and what an interrupted sweep has measured (default: bench/results/<GPU>)",
    )
    parser.add_argument(
        "--sel-rank-limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: give a rank up that is silent for so long (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel tune`: 0, 1 if it cannot tune here, 2 for bad arguments, 130 if it was interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = main_parser()
    args = parser.parse_args(argv)
    if args.top < 2:
        parser.error(f"--top: value is {args.top}, expected at least 2")
    try:
        chosen = select(args)
    except ValueError as error:
        parser.error(str(error))
    if args.regret and one_of_many():
        parser.error("--regret: is measured by one process, without torchrun")
    if one_of_many():  # by torchrun; else nothing of that is imported
        from . import ranks

        ranks.take_card()
    try:
        from .gpu import GpuSweepDevice, find  # needs Triton
    except ImportError as error:
        return _refuse(f"Triton cannot be imported: {error}")
    gpu = find()
    if isinstance(gpu, str):
        return _refuse(gpu)
    try:
        if args.regret:
            return tell_regret(args, chosen, gpu, GpuSweepDevice())
        job = ranks.join(args.sel_rank_limit, chosen) if one_of_many() else None
        return tune(args, chosen, gpu, GpuSweepDevice(), job=job)
    except DeviceLost as error:
        print(f"nsa-sel tune: a launch broke this process's access to the GPU: {error}", file=sys.stderr)
        print("A new process goes on without it.", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", __package__.rsplit(".", 2)[0], "tune", *argv])
    except KeyboardInterrupt:
        print("\nnsa-sel tune: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads any more: for the command line, which ends in silence
        raise
    except (SweepError, OSError) as error:
        return _refuse(str(error))


def tune(
    args: argparse.Namespace,
    chosen: Sequence[Case],
    gpu: Gpu,
    device: SweepDevice,
    compile_all: Compile = workers.compile_all,
    progress: Progress | None = None,
    job: Job | None = None,
) -> int:
    """Sweep, write the results, and return 0, or 1 if there is nothing for a table or, of a job, something missing."""
    machine = {name: value for name, value in environment().items() if name != "calibration"}
    out = args.out or default_folder(gpu.name)
    table = out if out.suffix == ".json" else out / tuned_table.file_name(gpu.name)
    folder = args.results or Path("bench/results") / slug(gpu.name)
    table.parent.mkdir(parents=True, exist_ok=True)
    path, machine["gpu"] = folder / "tune.jsonl", gpu.name
    if job is not None:
        from . import ranks

        progress = progress or ranks.SharedProgress(job)
    with contextlib.closing(Log(path, machine) if job is None else ranks.open_log(job, path, machine)) as log:
        sweep = Sweep(
            chosen,
            gpu,
            device,
            log,
            progress or Progress(),
            compile_all,
            every_chunk=args.exhaustive,
            top=args.top,
        )
        if job is None or job.leads:
            for line in sweep.plan():
                print(line, flush=True)
        results, missing = (sweep.run(), []) if job is None else ranks.run(job, sweep)
        if job is not None and not job.leads:
            return 0
        measured = {name: str(machine[name]) for name in ("torch", "triton", "driver", "cuda")}
        measured["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        written = write(results, sweep, table, folder, measured)
        if job is not None:  # a finished sweep is measured anew by the next
            job.let_go(not missing, job.others)
        if not missing:
            log.finish()
    for line in sweep.summary(results):
        print(line)
    for path in written:
        print(path)
    tuned_table.forget()
    if table not in written:
        print("No class has a launch to tune: no table.")
        return 1
    if missing:
        print("The same command measures what is missing.")
        return 1
    if table.parent.resolve() not in (tuned_table.LOCAL.resolve(), tuned_table.PACKAGED.resolve()):
        print(f"The run time reads it once it lies in {tuned_table.LOCAL}/ of the working directory.")
    return 0


def tell_regret(
    args: argparse.Namespace,
    chosen: Sequence[Case],
    gpu: Gpu,
    device: SweepDevice,
    compile_all: Compile = workers.compile_all,
    progress: Progress | None = None,
) -> int:
    """Measure the regret of every case, print and write it, and return 0, or 1 if none could be measured."""
    machine = {name: value for name, value in environment().items() if name != "calibration"}
    folder = args.results or Path("bench/results") / slug(gpu.name)
    with contextlib.closing(Log(folder / "regret.jsonl", {**machine, "gpu": gpu.name})) as log:
        sweep = regret.RegretSweep(chosen, gpu, device, log, progress or Progress(), compile_all)
        for line in sweep.plan():
            print(line, flush=True)
        found, missing = sweep.regrets(), sweep.missing()
        log.finish()
    for line in regret.lines(found, missing):
        print(line)
    if args.json:
        random = random_cases.asked_for(args.matrix, args.sel_seed, args.sel_count)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**regret.document(found, missing, sweep), "random": random, "machine": machine}, indent=1)
        replace_file(args.json, text + "\n")
        print(args.json)
    return 0 if found else 1


def _refuse(reason: str) -> int:
    print(f"nsa-sel tune: nothing can be tuned here: {reason}", file=sys.stderr)
    return 1
