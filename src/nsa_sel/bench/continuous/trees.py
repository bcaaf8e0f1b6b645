"""The two trees that are measured, unpacked where nobody edits them, and the copy of the suite that measures them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED = "nsa_sel"  # the package that a tree holds under src/
SUITE = f"{MEASURED}_suite"  # the name under which the suite's copy is imported beside it
WORKER = Path("bench/continuous/worker.py")
CASE_FILE = Path("bench/suite/case_file.py")  # a suite without it does not understand what this command asks of it
COPIED = ("src", "configs")  # of a working tree: the package, and the toggles that it reads where it runs
RUNNING = Path(__file__).parents[len(WORKER.parts) - 1]  # this package
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
TWO_TREES = "two unpacked trees by --base-dir DIR --head-dir DIR"
# Set inside a git hook, where they would make every command below work on the caller's own index.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


class TreeError(ValueError):
    """Say in one line which tree cannot be measured, and what to do."""


@dataclass(frozen=True)
class Tree:
    """Hold an unpacked tree: its short name, where it lies, and what a saved run says of its commit.

    foreign: it is of another repository than this package's, whose kernels are measured by the running suite.
    """

    name: str
    root: Path
    commit: Mapping[str, Any]
    foreign: bool = False

    def __post_init__(self) -> None:
        if not self.foreign and not (self.package / "__init__.py").is_file():
            raise TreeError(f"{self.name}: has no src/{MEASURED}; give a commit or a folder that has it")

    @property
    def package(self) -> Path:
        """Return the folder that what is measured is imported from."""
        return self.root if self.foreign else self.root / "src" / MEASURED

    @property
    def paths(self) -> list[Path]:
        """Return what comes first on the path of a measuring process."""
        return [self.root, self.root / "src"] if self.foreign else [self.package.parent]

    def fingerprint(self) -> str:
        """Return a hash of the package's files, which tells uncommitted changes and unpacked folders apart too."""
        found = hashlib.sha256()
        for path in sorted(self.package.rglob("*")):
            if path.is_file() and not {"__pycache__", ".git"} & set(path.relative_to(self.package).parts):
                found.update(f"{path.relative_to(self.package)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class Trees:
    """Hold both trees, and the folder that has the suite's copy; `note` says where that is not HEAD's own."""

    base: Tree
    head: Tree
    suite: Path
    note: str = ""


@contextmanager
def of_commits(repository: Path, base: str, head: str | None, foreign: bool = False) -> Iterator[Trees]:
    """Yield worktrees of two commits in a temporary folder, and remove them whatever happens.

    head: None is the working tree as it is, copied with its uncommitted changes. foreign: as in `Tree`.

    Raises: TreeError.
    """
    git = Git(repository, foreign)
    with _temporary_folder() as folder, ExitStack() as stack:
        old = stack.enter_context(git.worktree(base, folder / "base"))
        new = stack.enter_context(git.worktree(head, folder / "head")) if head else git.copy(folder / "head")
        yield _with_suite(old, new, folder / "suite")


@contextmanager
def of_folders(base: Path, head: Path, foreign: bool = False) -> Iterator[Trees]:
    """Yield two unpacked trees, which are read where they lie. foreign: as in `Tree`.

    Raises: TreeError.
    """
    with _temporary_folder() as folder:
        yield _with_suite(_folder(base, foreign), _folder(head, foreign), folder / "suite")


def _folder(path: Path, foreign: bool) -> Tree:
    return Tree(path.resolve().name, path.resolve(), _commit_info("unversioned"), foreign)


def _with_suite(base: Tree, head: Tree, folder: Path) -> Trees:
    """Copy HEAD's package under another name; where HEAD's does not know what this verb asks, the running package."""
    package, note = head.package, ""
    if head.foreign or not all((package / needed).is_file() for needed in (WORKER, CASE_FILE)):
        package = RUNNING
    if not head.foreign and package == RUNNING:
        note = f"{head.name} is older than this command: both are measured by the suite that runs it"
    _copy(package, folder / SUITE)
    return Trees(base, head, folder, note)


def _copy(source: Path, target: Path) -> None:
    if source.is_symlink() or source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
        return
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with ExitStack() as stack:
        with undisturbed():
            folder = Path(tempfile.mkdtemp(prefix="nsa-sel-continuous-"))
            stack.callback(_remove, folder)
        yield folder


def _remove(folder: Path) -> None:
    with undisturbed():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold signals that would end the process until the block is over: it is short, and must not be left half done."""
    held: list[int] = []
    before = {}
    try:
        for number in SIGNALS:  # a mask would hold them from this thread alone, and another would take them
            before[number] = signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


class Git:
    """Ask one repository, and change nothing of it but its list of worktrees."""

    def __init__(self, repository: Path, foreign: bool = False) -> None:
        self.folder, self.foreign = repository, foreign
        try:
            self.folder = Path(self.ask("rev-parse", "--show-toplevel"))
        except TreeError as error:
            raise TreeError(f"{error}; without one, give {TWO_TREES}") from None

    def ask(self, *arguments: str) -> str:
        """Return what a git command prints.

        Raises: TreeError with git's own last line.
        """
        # No hook of the repository runs, and `status` does not refresh the index.
        command = ["git", "-c", "core.hooksPath=/dev/null", "--no-optional-locks", "-C", str(self.folder), *arguments]
        env = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True)
        except FileNotFoundError:
            raise TreeError(f"there is no git here: give {TWO_TREES}") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise TreeError(f"{self.folder}: git {arguments[0]}: {said}")
        return done.stdout.strip()

    def commit(self, name: str) -> dict[str, Any]:
        """Return what a saved run says of a commit, by any of its names.

        Raises: TreeError.
        """
        try:
            found = self.ask("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except TreeError:
            raise TreeError(f"{name}: no commit of {self.folder}; see git log, or give --repo DIR") from None
        time, author_time = self.ask("show", "-s", "--format=%cI%n%aI", found).splitlines()
        project = {"project": self.folder.name} if self.foreign else {}
        return _commit_info(found, time=time, author_time=author_time, **project)

    @contextmanager
    def worktree(self, name: str, folder: Path) -> Iterator[Tree]:
        """Yield a worktree of a commit; remove it, and its entry in the repository, whatever happens."""
        commit = self.commit(name)
        with ExitStack() as stack:
            with undisturbed():
                stack.callback(self._remove, folder)
                self.ask("worktree", "add", "--quiet", "--detach", str(folder), commit["id"])
            yield Tree(commit["id"][:7], folder, commit, self.foreign)

    def _remove(self, folder: Path) -> None:
        with undisturbed():
            try:
                self.ask("worktree", "remove", "--force", str(folder))
            except TreeError:  # its folder is gone or damaged: without the folder the entry is one to prune
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(TreeError):
                    self.ask("worktree", "prune")

    def copy(self, folder: Path) -> Tree:
        """Return a copy of the working tree as it is; its name ends in -dirty where that is not its last commit."""
        commit = self.commit("HEAD")
        if self.foreign:
            present = self._files()
            dirty = bool(self.ask("status", "--porcelain"))
        else:
            present = [name for name in COPIED if (self.folder / name).is_dir()]
            dirty = bool(self.ask("status", "--porcelain", "--", *present))
        for name in present:
            _copy(self.folder / name, folder / name)
        branch = self.ask("rev-parse", "--abbrev-ref", "HEAD")
        commit |= {"dirty": dirty, "branch": "(detached head)" if branch == "HEAD" else branch}
        return Tree(commit["id"][:7] + ("-dirty" if dirty else ""), folder, commit, self.foreign)

    def _files(self) -> list[str]:
        """Return what the working tree has of tracked files, and of others that are not ignored."""
        listed = self.ask("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return [name for name in dict.fromkeys(listed) if name and os.path.lexists(self.folder / name)]


def _commit_info(commit: str, **more: Any) -> dict[str, Any]:
    """Return what pytest-benchmark saves of a commit."""
    times = {"time": None, "author_time": None}
    return {"id": commit, **times, "dirty": False, "project": MEASURED, "branch": "(detached head)", **more}


def file_name(name: str) -> str:
    """Return a tree's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "tree"
