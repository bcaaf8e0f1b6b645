"""Which saved run is meant: by file, name, prefix or commit, the latest, or the one to compare with by default."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from .run import Run, RunError, load, notes, read_json, short_name
from .speedups import EVERY_SDPA_FORM

BASELINE_NAME = "baseline"
STORAGE = Path(".benchmarks")
COVERED = 0.9  # of a run's timings but SDPA's; a run that has fewer of them is a part, and no opponent by default


def folder(uri: str) -> Path:
    """Return the storage folder that `--storage` names: a path, or file:// and a path."""
    return Path(uri.removeprefix("file://"))


def slug(gpu: str) -> str:
    """Return a GPU's name as the last part of a storage folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-")


def saved_runs(storage: Path, gpu: str | None = None) -> list[Path]:
    """List the numbered runs of one GPU (None: of all), `<storage>/<machine>-<GPU>/NNNN_<name>.json`, by number."""
    pattern = "*" if gpu is None else f"*-{slug(gpu)}"
    return sorted(storage.glob(f"{pattern}/[0-9][0-9][0-9][0-9]_*.json"), key=lambda path: (path.name[:4], str(path)))


def named(storage: Path, name: str, gpu: str | None = None) -> Path | None:
    """Return the newest run saved under `name` (`--benchmark-save=<name>`), or None."""
    found = [path for path in saved_runs(storage, gpu) if path.stem[5:] == name]
    return found[-1] if found else None


def find(spec: str, storage: Path, gpu: str | None = None, gpu_id: str | None = None) -> Path:
    """Return the run that `spec` means: a file, a saved name, a prefix such as 0001 or <folder>/0001, or a commit.

    A commit (HEAD~1, a short hash) means its newest whole run, if `gpu_id` is given the newest of that card. Of several
    GPUs' runs those of `gpu` are meant, if there are any.

    Raises: RunError if nothing or more than one run matches.
    """
    shown = spec if len(spec) <= 200 else f"{spec[:200]}…"
    try:
        if Path(spec).is_file():
            return Path(spec)
        if Path(spec).is_dir():
            raise RunError(f"{shown}: is a folder; give a file of it")
    except (OSError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{shown}: cannot be a file ({getattr(error, 'strerror', None) or error}); check it") from None
    if (path := named(storage, spec, gpu) or named(storage, spec)) is not None:
        return path
    place, _, prefix = spec.rpartition("/")
    prefix = prefix.rstrip("*").removesuffix(".json")
    found = sorted(
        path for path in storage.glob("*/*.json") if path.name.startswith(prefix) and place in ("", path.parent.name)
    )
    found = [path for path in found if gpu and path.parent.name.endswith(f"-{slug(gpu)}")] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(f"{shown}: means {len(found)} runs ({', '.join(map(short_name, found[:4]))}); give a file")
    where = f"{storage}/*-{slug(gpu)}" if gpu else f"{storage}/*"
    if commit := commit_id(spec):
        if (path := of_commit(storage, commit, gpu, gpu_id)) is not None:
            return path
        raise RunError(f"{shown}: commit {commit[:10]} has no whole saved run in {where}; see pytest-benchmark list")
    raise RunError(
        f"{shown}: no such file, no commit, and no saved run of that name or prefix in {where};"
        " see pytest-benchmark list"
    )


def commit_id(spec: str) -> str | None:
    """Return the id of the commit that git, or without history a hash itself, says is meant; None: no commit."""
    if not spec or spec.startswith("-"):
        return None
    try:
        command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{spec}^{{commit}}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, ValueError, subprocess.SubprocessError):
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.split()[-1]
    return spec if re.fullmatch("[0-9a-f]{7,40}", spec) else None


def of_commit(storage: Path, commit: str, gpu: str | None, gpu_id: str | None) -> Path | None:
    """Return the newest whole run of a commit, without uncommitted changes."""
    found = []
    for path in saved_runs(storage, gpu):
        about = notes(read_json(path))
        if about["commit"].startswith(commit) and not about["dirty"] and not about["interrupted"]:
            run = load(path)
            if not (run.unmeasured or run.shared_cards) and gpu_id in (None, run.environment["gpu_id"]):
                found.append((run.datetime, path))
    return max(found)[1] if found else None


def latest(storage: Path, gpu: str | None = None) -> Path | None:
    """Return the newest run.

    Raises: RunError if a candidate cannot be read.
    """
    newest: dict[Path, Path] = {}
    for path in saved_runs(storage, gpu):
        newest[path.parent] = path
    return max(((notes(read_json(path))["datetime"], path) for path in newest.values()), default=("", None))[1]


def is_clean(run: Run, new: Run) -> bool:
    """Tell whether `run` is an earlier run on the card of `new` that is fit to be compared with it.

    It is whole, and was measured without uncommitted changes and without confirmed regressions.
    """
    earlier = not new.datetime or run.datetime < new.datetime
    same_card = all(run.environment[field] == new.environment[field] for field in ("gpu", "gpu_id"))
    clean = not (run.interrupted or run.shared_cards or run.unmeasured or run.dirty or run.regressions)
    judged = [key for key in new.timings if key[1] not in EVERY_SDPA_FORM]
    covered = sum(key in run.timings for key in judged)
    return earlier and same_card and clean and covered >= COVERED * len(judged)


def choose(new: Run, runs: Iterable[Run]) -> Run | None:
    """Return the newest clean run of an earlier commit, else the newest named baseline; None without either.

    Where a run does not know its commit, a clean one is taken after all.
    """
    others = [run for run in runs if run.gpu == new.gpu and not _same(run.path, new)]
    clean = [run for run in others if is_clean(run, new)]
    of_earlier_commits = [run for run in clean if _of_another_commit(run, new)]
    baselines = [run for run in others if run.name.endswith(f"_{BASELINE_NAME}.json")]
    without_commit = [run for run in clean if not run.commit]
    return max(
        of_earlier_commits or baselines or without_commit, key=lambda run: (run.datetime, run.name), default=None
    )


def opponent(storage: Path, new: Run, spec: str | None = None) -> Run:
    """Return the run to compare `new` with: `spec` if given, else what `choose` chooses from the storage.

    Raises: RunError if there is none.
    """
    if spec is not None:
        return load(find(spec, storage, new.gpu, new.environment["gpu_id"]))
    run = choose(new, _candidates(storage, new))
    if run is None:
        raise RunError(
            f"{storage}: no earlier run of {new.gpu} to compare with;"
            f" save one: nsa-sel bench --benchmark-save={BASELINE_NAME}"
        )
    return run


def _candidates(storage: Path, new: Run) -> Iterator[Run]:
    """Yield each folder's newest run that can be compared with, and the newest named baseline: the files are large."""
    done: set[Path | str] = set()
    for path in reversed(saved_runs(storage, new.gpu)):
        is_baseline = path.stem[5:] == BASELINE_NAME and BASELINE_NAME not in done
        if _same(path, new) or path.parent in done and not is_baseline:
            continue
        run = load(path)
        if is_clean(run, new) and _of_another_commit(run, new):
            done.add(path.parent)
        if is_baseline:
            done.add(BASELINE_NAME)
        yield run


def _of_another_commit(run: Run, new: Run) -> bool:
    """Tell whether the code differs: uncommitted changes are compared with their commit."""
    return bool(run.commit) and (run.commit != new.commit or new.dirty)


def _same(path: Path | str, run: Run) -> bool:
    return bool(run.path) and Path(path).resolve() == Path(run.path).resolve()
