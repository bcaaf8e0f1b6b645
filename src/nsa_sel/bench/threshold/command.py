"""The min-L rule: from which selected length L on a kernel is safe to switch on, and writing that decision down."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config import ConfigError, config_to_write
from ..command_line import Parser
from ..saved import storage
from ..saved.run import RunError, Saved
from ..saved.speedups import TRITON
from ..suite import case_file, cases
from ..suite.case_file import CaseFileError
from . import write
from .judged import Own, ThresholdError
from .rule import decide


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel threshold`: 0 with a threshold, 1 if the data supports none, 2 if it cannot be judged or written."""
    args = main_parser().parse_args(argv)
    folder = storage.folder(args.storage)
    try:
        file = args.sel_cases
        own = None if file is None else Own(file.name, case_file.read(file, args.sel_dtype))
        decision = decide([Saved.load(storage.find(run, folder)) for run in args.runs], args.matrix, own, args.kernel)
        print(write.as_text(decision))
        if args.apply and decision.min_L is not None:
            config = args.config or config_to_write()
            changed = write.apply(decision, config, args.prd)
            print("Wrote " + ", ".join(map(str, changed)) if changed else "Already written; nothing changes.")
            print(_who_reads(config))
    except (RunError, ThresholdError, ConfigError, CaseFileError) as error:
        print(f"nsa-sel threshold: {error}", file=sys.stderr)
        return 2
    if args.apply and decision.min_L is None:
        print("Nothing is written.")
    return int(decision.min_L is None)


def _who_reads(config: Path) -> str:
    who = "Programs started in this folder read it, others" if config == config_to_write() else "It is read"
    return f"{who} with NSA_SEL_CONFIG={config.absolute()}"


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel threshold` is asked with."""
    parser = Parser(
        "nsa-sel threshold",
        description=__doc__,
        examples="""
            nsa-sel threshold 0001 0002 --apply   of two full runs, and write it down
            nsa-sel threshold 0003 --matrix hot   what one run of the hot cases supports""",
        epilog="exit code: 0 a threshold; 1 the runs support none; 2 it cannot be judged or written",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="files, saved names or prefixes: runs of one GPU, or chunks of one"
    )
    parser.add_argument("--storage", default=str(storage.STORAGE), metavar="DIR", help="folder of the saved runs")
    parser.add_argument(
        "--kernel", default=TRITON["op"], metavar="NAME", help="the kernel that is judged (default: ours, %(default)s)"
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--matrix",
        choices=cases.MATRICES,
        help="the cases that must be there, in each dtype (default: those of the runs' own file, else full)",
    )
    wanted.add_argument("--sel-cases", type=Path, metavar="FILE", help="a YAML file of cases, in place of a matrix")
    parser.add_argument("--sel-dtype", choices=cases.DTYPES, default="bf16", help="of its cases that name none")
    parser.add_argument("--apply", action="store_true", help="write the value and its rationale")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file to write, made if missing (default: NSA_SEL_CONFIG, else configs/base.yaml here)",
    )
    parser.add_argument(
        "--prd", type=Path, metavar="FILE", default=Path("PRD.md"), help="file for the rationale, made if missing"
    )
    return parser
