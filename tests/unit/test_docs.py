"""README and docs/: links lead somewhere, every command is one that exists, and those that cost seconds are run."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.cli import make_parser

from nsa_sel import SelConfig
from nsa_sel.bench import cli
from nsa_sel.bench.report import screen
from tests.programs import python

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "PERFORMANCE.md", "PRD.md")] + DOCS
BASELINES = [f".benchmarks/Linux-CPython-3.12-64bit-NVIDIA-H200/000{n}_baseline.json" for n in (1, 2)]
README, COMPARING = ROOT / "README.md", ROOT / "docs/comparing.md"
PROGRAMS = ("nsa-sel", "pytest", "pytest-benchmark", "make", "pip", "python", "python3", "git", "torchrun")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)

# Run as documented, but for what the second column adds or replaces: small cases, and runs that exist.
RUN = {
    "nsa-sel": {},
    "nsa-sel compare": {},
    "nsa-sel why --H 8 --D 128 --N 64 --L 1024 --spans 8 --gpu sm_89": {},
    "nsa-sel compare OLD NEW --markdown comment.md --json found.json --junit junit.xml": {"OLD": "0001", "NEW": "0002"},
    "pytest-benchmark compare": {},
    "pytest tests/parity": {"+": "-q -k every_number_of_spans"},
    "pytest tests/perf --benchmark-autosave": {"+": "-q --sel-family decode"},
    "python bench/bench_sel_triton.py --H 16 --D 192 --Dv 128 --N 64 --L_list 512,1024": {"+": "--N 2 --L_list 16"},
}
# Of all others only the options are parsed, or what each line says; why:
PARSED = {
    "nsa-sel continuous": "measures two commits: minutes",
    "nsa-sel completion": "needs shtab; tests/unit/test_command_line.py runs it",
    "nsa-sel decide": "minutes; tests/unit/test_decide.py has its course",
    "nsa-sel tune": "needs a GPU",
    "nsa-sel why": "needs a GPU where none is named",
    "nsa-sel threshold": "test_threshold_apply_works_as_written runs it",
    "nsa-sel compare": "of runs, commits and folders that a reader has; `nsa-sel compare` itself is run",
    "nsa-sel report": "of a run that a reader has; tests/unit/test_report.py runs it",
    "nsa-sel parity": "minutes; tests/unit/test_wheel.py runs it",
    "nsa-sel bench": "needs a GPU for more than what test_wheel.py runs",
    "pytest": "minutes, a GPU, or a kernel and a file that a reader has",
    "pytest-benchmark": "of runs that a reader has; `pytest-benchmark compare` itself is run",
    "python -m pytest": "minutes",
    "python -m nsa_sel": "minutes or a GPU; nsa-sel is run",
    "python bench/bench_sel_triton.py": "tests/unit/test_bench_script.py runs it with other sizes",
    "make": "installs, or takes minutes; the target must exist",
    "pip": "needs a package index; the extras must exist",
    "git clone": "needs a network",
    "torchrun": "wants a card for each process; tests/unit/test_ranks.py runs its three commands",
}


class Parsed(Exception):
    """Stop a program once it has parsed its arguments."""


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" means what a program printed."""
    return [body for found, body in FENCE.findall(text_of(page)) if found == language]


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line, without its comment and the variables set before it."""
    for part in line.split("&&"):
        words = [word for word in shlex.split(part, comments=True) if word != "…"]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words and words[0] != "cd":
            yield words


def documented() -> dict[str, str]:
    """Return every command of the pages with the page that has it, "(named)" if only running text does."""
    found: dict[str, str] = {}
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).splitlines():
            found.update({shlex.join(words): page.name for words in commands(line)})
    for page in PAGES:
        for span in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page))):
            code = " ".join(span.split())
            if code.split()[0] in PROGRAMS and "VERB" not in code:
                code = re.sub(r"[][]", "", code) if " [" in code else code  # what may be left out
                for words in commands(code):
                    found.setdefault(shlex.join(words), f"{page.name} (named)")
    return found


DOCUMENTED = documented()


@functools.cache
def parser_of_pytest(config: pytest.Config) -> argparse.ArgumentParser:
    return config._parser.optparser if hasattr(config._parser, "optparser") else config._parser._getparser()


def parse(words: list[str], config: pytest.Config) -> None:
    """Let the program that a command names parse its arguments; SystemExit, or an error of its own, if it refuses."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        assert {name for word in rest for of in re.findall(r"\[(.*)\]", word) for name in of.split(",")} <= extras
    elif (
        program == "pytest"
        or rest[:2] == ["-m", "pytest"]
        or words[:2] in (["nsa-sel", "parity"], ["nsa-sel", "bench"])
    ):
        rest = rest[2:] if rest[:2] == ["-m", "pytest"] else rest[program == "nsa-sel" :]
        paths = parser_of_pytest(config).parse_args(rest).file_or_dir
        assert all((ROOT / path).exists() for path in paths), words
    elif program == "torchrun" and rest:
        parse(["python", *rest[rest.index("-m") :]], config)
    elif program == "pytest-benchmark":
        make_parser().parse_args(rest)
    elif program == "nsa-sel" or rest[:2] == ["-m", "nsa_sel"]:
        with pytest.raises(Parsed):
            cli.main(rest if program == "nsa-sel" else rest[2:])
    elif rest[:1] == ["-m"]:
        with pytest.raises(Parsed):
            importlib.import_module(rest[1]).main(rest[2:])
    elif program.startswith("python"):
        spec = importlib.util.spec_from_file_location("script", ROOT / rest[0])
        assert spec is not None and spec.loader is not None, words
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        with pytest.raises(Parsed):
            script.main(rest[1:])


@pytest.fixture
def only_parsing(monkeypatch) -> None:
    """Let every program stop once its arguments are parsed."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        found = real(self, args, namespace)
        if self.prog.startswith(("nsa-sel", "python", "script", "pytest", "__main__")) and not hasattr(
            found, "file_or_dir"
        ):
            raise Parsed
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """Return a copy of what the commands read, as the working directory."""
    for name in ("README.md", "PRD.md", "conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("configs", "tests", "bench", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for run in BASELINES:
        (tmp_path / run).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / run).symlink_to(ROOT / run)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], folder: Path) -> str:
    """Run a command in the folder as on a machine without a GPU, and return what it printed."""
    program, *rest = words
    if program == "nsa-sel":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(rest) == 0, words
        return out.getvalue()
    started = {"pytest": ["-m", "pytest"], "pytest-benchmark": ["-m", "pytest_benchmark"], "python": []}[program]
    unwanted = ("NSA_", "PYTEST", "TRITON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = python(*started, *rest, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shown(page: Path, beginning: str) -> list[str]:
    """Return the lines of the one printed block that begins so, but for what is left out and blank ones."""
    (block,) = [block for block in blocks(page, "") if block.startswith(beginning)]
    return [line for line in block.splitlines() if line.strip() not in ("", "...")]


# --- links ---


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def dead_links(page: Path) -> list[str]:
    """List the relative links of a page that lead nowhere."""
    dead = []
    text = re.sub(r"(?<!\[)`[^`]+`(?!\])", "", FENCE.sub("", text_of(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    assert dead_links(page) == []


def test_a_dead_link_and_a_dead_anchor_are_seen(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A `b`, and c\n[x](#a-b-and-c) [y](gone.md) [z](a.md#gone) [w](https://x.org/#y)\n"
    )
    assert dead_links(tmp_path / "a.md") == ["gone.md", "a.md#gone"]


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of(ROOT / "docs/README.md")))
    assert linked == {page.name for page in DOCS} - {"README.md"}


# --- commands ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_commands_say_so(page):
    for block in blocks(page, ""):
        assert block.split()[0] not in PROGRAMS or "──" in block, f"a block of commands is not marked sh: {block}"


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda command: f"{DOCUMENTED[command]}: {command}")
def test_every_command_is_understood_by_its_program(command, only_parsing, pytestconfig, capsys):
    assert command in RUN or command.startswith(tuple(PARSED)), "neither run nor on the list of those that are not"
    try:
        parse(shlex.split(command), pytestconfig)
    except SystemExit:
        named = DOCUMENTED[command].endswith("(named)")  # running text need not give every argument
        assert named and "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["nsa-sel compare --agian", "pytest tests/parity --sel-kernl x:y", "make tets"])
def test_a_command_that_is_not_understood_is_seen(command, only_parsing, pytestconfig):
    with pytest.raises((SystemExit, pytest.UsageError, AssertionError)):
        parse(shlex.split(command), pytestconfig)


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        for inner in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from options(inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_running_text_exists(page, pytestconfig):
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    known = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text(encoding="utf-8") for path in sources)))
    known |= set(options(parser_of_pytest(pytestconfig))) | set(options(make_parser()))
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page)))
    spans = [span for span in spans if not span.startswith("pip ")]
    used = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span)}
    assert used <= known


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the forms without a GPU")
@pytest.mark.parametrize("command", RUN)
def test_commands_that_cost_seconds_do_what_is_shown(command, clone):
    assert command in DOCUMENTED
    words = shlex.split(command)
    printed = run([RUN[command].get(word, word) for word in words] + shlex.split(RUN[command].get("+", "")), clone)
    if command == "nsa-sel compare":
        assert [line for line in shown(COMPARING, "nsa_sel: Linux") if line not in printed.splitlines()] == []
    if command.startswith("nsa-sel why"):
        assert shown(ROOT / "docs/kernel.md", "GPU ") == printed.splitlines()
    if command == "pytest-benchmark compare":
        lines = shown(README, "nsa_sel: Linux") + shown(COMPARING, "verdict: pass, nothing got slower\n\nLegend")
        assert [line for line in lines if line not in printed.splitlines()] == []


def test_threshold_apply_works_as_written(clone):
    assert "nsa-sel threshold RUN.json --apply" in DOCUMENTED
    config = clone / "configs/base.yaml"
    config.write_text(re.sub(r" *NVIDIA H200: .*\n", "", config.read_text()))
    assert not SelConfig.load(config, env={}).has_entry("NVIDIA H200")
    run(["nsa-sel", "threshold", "0001", "0002", "--apply"], clone)
    decided = SelConfig.load(ROOT / "configs/base.yaml", env={}).min_len_for("NVIDIA H200")
    assert SelConfig.load(config, env={}).min_len_for("NVIDIA H200") == decided


def test_the_readme_shows_the_summary_of_the_saved_run():
    saved = json.loads((ROOT / BASELINES[0]).read_text())
    results = [{**b["extra_info"], "device_us": b["stats"]["median"] * 1e6} for b in saved["benchmarks"]]
    assert [line for line in shown(README, "family ") if line not in screen.screen(results)] == []


# --- Python ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_the_readme_s_python_runs(capsys):
    (block,) = blocks(README, "python")
    names: dict = {}
    exec(block.replace('"cuda"', '"cpu"'), names)
    assert names["out"].shape == (2, 1, 4, 8, 128)
    assert "no CUDA device" in capsys.readouterr().out
