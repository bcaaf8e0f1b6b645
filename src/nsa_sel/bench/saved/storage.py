"""Which saved run is meant: by file, by name, by prefix, the latest, or the baseline of a GPU."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from .run import RunError, notes, read_json, short_name

BASELINE_NAME = "baseline"
STORAGE = Path(".benchmarks")


def slug(gpu: str) -> str:
    """Return a GPU's name as the last part of a storage folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-")


def saved_runs(storage: Path, gpu: str | None = None) -> list[Path]:
    """List the numbered runs of one GPU (None: of all), `<storage>/<machine>-<GPU>/NNNN_<name>.json`, by number."""
    folder = "*" if gpu is None else f"*-{slug(gpu)}"
    return sorted(storage.glob(f"{folder}/[0-9][0-9][0-9][0-9]_*.json"), key=lambda path: (path.name[:4], str(path)))


def named(storage: Path, name: str, gpu: str | None = None) -> Path | None:
    """Return the newest run saved under `name` (`--benchmark-save=<name>`), or None."""
    found = [path for path in saved_runs(storage, gpu) if path.stem[5:] == name]
    return found[-1] if found else None


def find(spec: str, storage: Path, gpu: str | None = None) -> Path:
    """Return the run that `spec` means: a file, a saved name, or a prefix such as 0001 or <folder>/0001.

    Raises: RunError if nothing or more than one run matches.
    """
    if Path(spec).is_file():
        return Path(spec)
    if (path := named(storage, spec, gpu)) is not None:
        return path
    folder, _, prefix = spec.rpartition("/")
    pattern = f"{glob.escape(folder) or '*'}/{glob.escape(prefix.rstrip('*'))}*.json"
    found = sorted(storage.glob(pattern))
    if gpu is not None and not folder:
        found = [path for path in found if path.parent.name.endswith(f"-{slug(gpu)}")]
    if len(found) == 1:
        return found[0]
    if not found:
        where = f"{storage}/*-{slug(gpu)}" if gpu else f"{storage}/*"
        raise RunError(
            f"{spec}: no such file, and no saved run of that name or prefix in {where}; see pytest-benchmark list"
        )
    raise RunError(f"{spec}: means {len(found)} runs ({', '.join(map(short_name, found[:4]))}); give a file")


def latest(
    storage: Path, gpu: str | None = None, *, other_than: Path | None = None, clean: bool = False
) -> Path | None:
    """Return the newest run; `clean` leaves out those with confirmed regressions and those cut short.

    Raises: RunError if a candidate cannot be read.
    """
    newest: dict[Path, tuple[str, Path]] = {}
    for path in reversed(saved_runs(storage, gpu)):
        if path.parent in newest or path == other_than:
            continue
        about = notes(read_json(path))
        if not (clean and (about["regressions"] or about["interrupted"])):
            newest[path.parent] = (about["datetime"], path)
    return max(newest.values())[1] if newest else None


def baseline(storage: Path, gpu: str, spec: str | None = None, *, other_than: Path | None = None) -> Path:
    """Return the run to compare with: `spec` if given, else the GPU's named baseline, else its latest clean run.

    Raises: RunError if there is none.
    """
    if spec is not None:
        return find(spec, storage, gpu)
    path = named(storage, BASELINE_NAME, gpu) or latest(storage, gpu, other_than=other_than, clean=True)
    if path is None:
        raise RunError(
            f"{storage}: no earlier run of {gpu} to compare with;"
            f" save one: pytest tests/perf --benchmark-save={BASELINE_NAME}"
        )
    return path
