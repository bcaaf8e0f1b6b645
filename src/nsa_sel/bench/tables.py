"""Text that leaves the program: tables in CSV and Markdown, names made harmless, files replaced in one step."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path


def printable(text: str) -> str:
    """Return `text` with control characters escaped: names in a saved run are data, never terminal commands."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def as_csv(lines: Iterable[Iterable[object]]) -> str:
    """Return lines of cells as CSV; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, the heading first, as a Markdown table without a newline at its end."""
    head, *body = lines
    return "\n".join([markdown_line(head), "|" + "---|" * len(head), *map(markdown_line, body)])


def markdown_line(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table, with what would end a cell or begin a tag escaped."""
    return "| " + " | ".join(printable(cell).replace("<", "&lt;").replace("|", "\\|") for cell in cells) + " |"


def replace_file(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that a reader never sees half of it; a link's target is replaced."""
    target = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, target.stat().st_mode if target.exists() else 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
