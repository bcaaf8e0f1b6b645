"""Turn a saved run into files that people look at: CSV, Markdown, and one page that opens from disk."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config import ConfigError, SelConfig
from ..command_line import Parser
from ..compare.rule import compare
from ..saved import storage
from ..saved.run import RunError, Saved, load
from ..saved.speedups import TRITON
from ..tables import replace_file
from ..threshold.judged import ThresholdError
from ..threshold.rule import Decision, decide
from ..threshold.write import sentence
from . import history, page, pictures, plots, tables

NO_GPU = "This run has no GPU figures: what is timed was timed on the CPU, and no threshold follows from it."


def judge(saved: Saved, kernel: str = TRITON["op"]) -> tuple[str, Decision | None]:
    """Return the verdict on a kernel in one sentence, and the decision behind it; None without GPU figures.

    Raises: ThresholdError as `decide`.
    """
    if not saved.run.on_gpu:
        return NO_GPU, None
    if saved.run.random:
        return "Random cases: no threshold follows from them.", None
    decided = decide([saved], kernel=kernel)
    return sentence(decided), decided


def write(run: Path, old: Path | None, out: Path, config: SelConfig, folder: Path | None = None) -> list[Path]:
    """Write report.html, results.csv, results.md and the speed-up plot of a run to a folder; return the files.

    folder: the storage whose runs are the page's history.

    Raises: RunError or ThresholdError if a run cannot be read or judged; ImportError without the plotting library.
    """
    saved = Saved.load(run)
    compared = None if old is None else compare(load(old), saved.run)
    rows = tables.table(saved)
    verdicts = {kernel: judge(saved, kernel) for kernel in tables.kernels(rows)[: None if saved.run.on_gpu else 1]}
    (kernel, (_, decided)), *others = verdicts.items()
    chosen, source = chosen_length(saved.run.gpu, decided, config)
    lengths = {kernel: chosen, **{name: judged.min_L if judged else None for name, (_, judged) in others}}
    # Without a GPU there is nothing to plot; a case without a length has no place on an axis.
    drawn = [r for r in rows if r["L"] and r["N"]] if decided else []
    plotted = {name: plots.speedup_by_length(drawn, length, name) for name, length in lengths.items()}
    files = storage.saved_runs(folder, saved.run.gpu) if folder and decided else []
    past = history.read(files, saved, rows)
    figures = pictures.data(rows, tables.read_limit(saved.machine), lengths, compared, past)
    beside, notes = tables.peers(saved)
    heading = f"nsa_sel on {saved.run.gpu}, {saved.run.datetime[:10] or 'undated'}"
    said = list(verdicts.values())
    url = commit_url(saved.commit)
    texts = {
        "report.html": page.render(heading, said, source, saved, rows, figures, compared, beside, notes, url),
        "results.csv": tables.csv_text(rows),
        "results.md": tables.markdown_text(heading, [text for text, _ in said], rows, beside, notes),
    }
    texts |= {
        "speedup.svg" if name == kernel else f"speedup-{name}.svg": plot for name, plot in plotted.items() if plot
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        replace_file(out / name, text)
    return [out / name for name in texts]


def commit_url(commit: str) -> str:
    """Return where a browser finds a commit that this repository's `origin` has; "" if that is not known."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20).stdout.strip()

    if not re.fullmatch("[0-9a-f]{40}", commit):
        return ""
    try:
        there = git("for-each-ref", "--count=1", "--contains", commit, "refs/remotes/origin")
        remote = git("remote", "get-url", "origin") if there else ""
    except (OSError, subprocess.SubprocessError):
        return ""
    known = re.fullmatch(r"(?:https://|ssh://)?(?:[^@/]+@)?([\w.-]+\.\w+)(?::\d+)?[:/]([\w./~-]+?)(?:\.git)?/?", remote)
    return f"https://{known[1]}/{known[2]}/commit/{commit}" if known else ""


def chosen_length(gpu: str, decided: Decision | None, config: SelConfig) -> tuple[int | None, str]:
    """Return the threshold to draw, and where it comes from: the configuration's entry for this GPU, else this run."""
    if decided is None:
        return None, ""
    if decided.kernel != TRITON["op"]:  # the configuration is of our kernel alone
        return decided.min_L, ""
    if config.has_entry(gpu):
        value = config.min_len_for(gpu)
        said = f"The configuration switches Triton on from L = {value}." if value else "The configuration says never."
        return value, said
    return (
        decided.min_L,
        "The configuration has no entry for this GPU yet: nsa-sel threshold RUN.json … --apply writes it.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nsa-sel report`: 0, or 2 if a run cannot be read or the plotting library is missing."""
    parser = main_parser()
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        parser.error("give one run, or OLD and NEW")
    folder = storage.folder(args.storage)
    try:
        *old, new = (storage.find(run, folder) for run in args.runs)
        written = write(new, old[0] if old else None, args.out, SelConfig.load(env={}), folder)
    except (RunError, ThresholdError, ConfigError, OSError) as error:
        print(f"nsa-sel report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"nsa-sel report: needs {error.name}, of the extra `bench`: pip install 'nsa-sel[bench]'", file=sys.stderr
        )
        return 2
    for path in written:
        print(path)
    return 0


def main_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel report` is asked with."""
    parser = Parser(
        "nsa-sel report",
        description=__doc__,
        examples="""
            nsa-sel report 0002 --out report        one saved run
            nsa-sel report 0001 0002 --out report   and what changed since an older one""",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[OLD] NEW", help="files, saved names, prefixes or commits; OLD: what changed since"
    )
    parser.add_argument("--storage", default=str(storage.STORAGE), metavar="DIR", help="folder of the saved runs")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the files, made if missing (required)"
    )
    return parser
