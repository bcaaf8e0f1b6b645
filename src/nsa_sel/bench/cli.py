"""The command `nsa-sel VERB`; with no verb, describe machine, versions, toggles and routing."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import Route, __version__, choose_route
from ..config import ConfigError, SelConfig
from .command_line import Parser, exit_code
from .timer import machine

# A verb's function, imported only when asked for: `report` needs matplotlib, which a plain install does not have.
VERBS = {
    "parity": ("run_tests:parity", "is a kernel right here? runs the parity suite with pytest"),
    "bench": ("run_tests:bench", "how fast is it here? runs the perf suite with pytest"),
    "compare": (
        "compare.command:main",
        "two saved runs or commits: what got slower, what is suspect; exits 1 on a regression, 3 on a suspect",
    ),
    "continuous": (
        "continuous.command:main",
        "two commits, measured in turns on this card: did the second make it slower?",
    ),
    "report": ("report.command:main", "tables and pictures from saved runs"),
    "decide": (
        "decide.command:main",
        "for a new card: parity, tune, two perf runs, threshold and report; goes on if ended",
    ),
    "tune": ("tune.command:main", "which tiles, splits and warps are fastest here; writes the table that is used"),
    "why": ("why.command:main", "which launch a call gets, and which rule decided it"),
    "threshold": ("threshold.command:main", "the length L from which Triton is safe to switch on here"),
    "completion": ("cli:completion", "prints what lets a shell complete these words and their options"),
}
SHELLS = ("bash", "zsh", "tcsh")
EXAMPLE_LENGTHS = (16, 64, 256, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb, or describe this machine; return the exit code, 2 for a malformed toggle."""
    return exit_code(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: Sequence[str]) -> int:
    if argv and argv[0] in VERBS:
        return function_of(argv[0])(argv[1:])
    _parser().parse_args(argv)
    try:
        for line in describe(SelConfig.load()):
            print(line)
        print(f"Verbs, each with its own --help\n{_verbs()}")
    except ConfigError as error:
        print(f"nsa-sel: {error}", file=sys.stderr)
        return 2
    return 0


def function_of(verb: str) -> Callable[[Sequence[str]], int]:
    """Return the function behind a verb: it takes the arguments and returns the exit code."""
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a verb's options: in its module, and called <function>_parser."""
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), f"{function}_parser")()


def completion(argv: Sequence[str]) -> int:
    """Run `nsa-sel completion SHELL`: print a script; 2 without the library that writes it."""
    shell = completion_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        print("nsa-sel completion: needs shtab, of the extra `bench`: pip install 'nsa-sel[bench]'", file=sys.stderr)
        return 2
    whole = argparse.ArgumentParser(prog="nsa-sel", description="NSA selection")
    verbs = whole.add_subparsers()
    for verb, (_, meaning) in VERBS.items():
        of_verb = verbs.add_parser(verb, help=meaning, description=meaning, parents=[parser_of(verb)], add_help=False)
        for action in of_verb._actions:
            if action.metavar in ("FILE", "FILE|DIR", "RUN", "OLD", "NEW", "[OLD] NEW"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar == "DIR":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell))
    return 0


def completion_parser() -> argparse.ArgumentParser:
    """Return what `nsa-sel completion` is asked with."""
    parser = Parser(
        "nsa-sel completion",
        description="Print what lets a shell complete `nsa-sel`; a new shell reads it from these places.",
        examples="""
            nsa-sel completion bash > ~/.local/share/bash-completion/completions/nsa-sel
            nsa-sel completion zsh > ~/.zfunc/_nsa-sel  # needs fpath+=~/.zfunc before compinit""",
    )
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    return parser


def describe(config: SelConfig) -> Iterator[str]:
    """Yield the lines that say what runs here: machine, versions, toggles with their source, and what "auto" does."""
    yield "Machine"
    yield f"  CPU     {platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield from (f"  GPU {i}   {name}" for i, name in enumerate(gpus))
    if not gpus:
        yield "  GPU     none that torch can use"
    versions = machine.environment()
    yield "Versions"
    yield f"  nsa_sel {__version__}, python {platform.python_version()}"
    yield f"  torch   {torch.__version__}, triton {versions['triton'] or 'none'}"
    yield f"  CUDA    {versions['cuda'] or 'none in this torch'}, driver {versions['driver'] or 'none'}"
    yield "Toggles"
    for name, source in config.sources.items():
        yield f"  {name:<17} {getattr(config, name)!s:<18} from {source}"
    yield 'What backend="auto" does here (H=8, D=Dv=128, bf16, one span)'
    for length in EXAMPLE_LENGTHS:
        route = _auto_route(length, "cuda" if gpus else "cpu", config)
        yield f"  L={length:<5} {route.backend:<12} {route.reason}"


def _auto_route(length: int, device: str, config: SelConfig) -> Route:
    q = torch.zeros(1, 1, 1, 8, 128, dtype=torch.bfloat16, device=device)
    kv = torch.zeros(1, 1, length, 128, dtype=torch.bfloat16, device=device)
    ranges = torch.tensor([0, length], device=device).view(1, 1, 1, 1, 2)
    return choose_route(q, kv, kv, ranges, config=config, min_len=length, max_len=length)


def _verbs() -> str:
    return "\n".join(f"  {verb:<10} {meaning}" for verb, (_, meaning) in VERBS.items())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "nsa-sel",
        description="With no verb: machine, versions, toggles and where they came from, and what `auto` would do here.",
        examples="""
            nsa-sel
            nsa-sel parity
            nsa-sel bench --benchmark-autosave""",
        epilog=f"verbs, each with its own --help:\n{_verbs()}",
    )
    parser.add_argument("verb", nargs="?", choices=list(VERBS), metavar="VERB", help="see below")
    parser.add_argument("--version", action="version", version=__version__)
    return parser
