"""What all commands have in common: help with every default, errors of one line, colours, an end without readers."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from typing import NoReturn

CLOSED = 141  # 128 + SIGPIPE, as of a program that the closed pipe itself ends


class Help(argparse.HelpFormatter):
    """Fill paragraphs, leave indented ones as they are, and say the default of every option."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "  " in part else textwrap.fill(part, width) for part in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        if not action.option_strings or action.required or action.default == argparse.SUPPRESS or "default" in said:
            return said
        if action.default is False:
            return f"{said} (default: off)"
        return f"{said} (default: none)" if action.default in (None, []) else f"{said} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parse a command's arguments. examples: lines of the help, each a command and what it does."""

    def __init__(self, prog: str | None = None, *, description: str | None, examples: str, epilog: str = "") -> None:
        shown = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
        super().__init__(prog, description=description, epilog=f"{shown}\n\n{epilog}", formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, without the usage before it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def shows_colour() -> bool:
    """Tell whether standard output is a terminal that may be coloured."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, or end in silence when nobody reads its output any more (`| head`)."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, and not when Python ends, where a closed pipe would be reported
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return CLOSED
