"""The min-L rule: from which selected length L on a kernel is safe to switch on, and writing that decision down."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config import ConfigError
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
    parser = argparse.ArgumentParser(prog="nsa-sel threshold", description=__doc__)
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
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"), help="YAML file to write")
    parser.add_argument("--prd", type=Path, default=Path("PRD.md"), help="requirements file to write")
    args = parser.parse_args(argv)
    folder = storage.folder(args.storage)
    try:
        file = args.sel_cases
        own = None if file is None else Own(file.name, case_file.read(file, args.sel_dtype))
        saved = [Saved.load(storage.find(run, folder)) for run in args.runs]
        decision = decide(saved, args.matrix, own, args.kernel)
        print(write.as_text(decision))
        if decision.min_L is None:
            if args.apply:
                print("Nothing is written.")
            return 1
        if args.apply:
            changed = write.apply(decision, args.config, args.prd)
            print("Wrote " + ", ".join(map(str, changed)) if changed else "Already written; nothing changes.")
    except (RunError, ThresholdError, ConfigError, CaseFileError) as error:
        print(f"nsa-sel threshold: {error}", file=sys.stderr)
        return 2
    return 0
