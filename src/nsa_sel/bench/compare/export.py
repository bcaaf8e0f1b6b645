"""A comparison for other programs: JSON, Markdown for a pull request's comment, JUnit XML for a CI server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from ..saved.speedups import is_kernel
from ..tables import as_markdown, printable
from .result import SHOWN, Change, Comparison, by_family, describe

LISTS = ("regressions", "suspects", "improvements", "noise", "cleared", "warnings")


def as_json(comparison: Comparison) -> str:
    """Return everything that was found, every list uncut; times in µs."""
    found: dict[str, Any] = {"verdict": comparison.verdict, "exit_code": comparison.exit_code}
    found["runs"] = {
        side: {"name": run.name, "datetime": run.datetime, "commit": run.commit, **run.environment}
        for side, run in (("old", comparison.old), ("new", comparison.new))
    }
    found |= {"compared": comparison.compared, "circumstances": comparison.circumstances()}
    found["launch_floor_us"] = comparison.machine.shift_us
    found["sdpa_ratio"] = comparison.sdpa_ratio
    found["families"] = [dataclasses.asdict(part) for part in comparison.roll_up]
    found |= {name: [dataclasses.asdict(change) for change in getattr(comparison, name)] for name in LISTS}
    found |= {name: [list(key) for key in getattr(comparison, name)] for name in ("missing", "new_cases")}
    return json.dumps(found, indent=1) + "\n"


def as_comment(comparison: Comparison) -> str:
    """Return Markdown: the verdict, what changed as a whole, and the worst of each list."""
    blocks = [f"### nsa_sel: {_plain(comparison.verdict)}"]
    blocks.append(_plain(f"{describe(comparison.old)} → {describe(comparison.new)}, {comparison.compared} timings"))
    blocks += ["\n".join(f"- {_plain(line)}" for line in comparison.circumstances())]
    if comparison.roll_up:
        lines = [["family", "scope", "cases", "new / old", "95 % interval"]]
        for part in comparison.roll_up:
            interval = f"{part.interval[0]:.3f} to {part.interval[1]:.3f}" if part.interval else "–"
            lines.append([part.name, part.scope, str(part.cases), f"{part.ratio:.3f}x", interval])
        blocks.append(as_markdown(lines))
    for title, changes in (("Slower", comparison.regressions), ("Suspect", comparison.suspects)):
        blocks += _changes(title, changes)
    if comparison.suspects and comparison.new.path:
        blocks.append(f"Measure again on this GPU: `{printable(comparison.command_again())}`")
    if comparison.missing:
        blocks.append(f"**Missing ({len(comparison.missing)})**, asked for and not measured")
        blocks.append(as_markdown([["case", "method"], *map(list, comparison.missing[:SHOWN])]))
    blocks += _changes("Faster", comparison.improvements)
    return "\n\n".join(filter(None, blocks)) + "\n"


def _changes(title: str, changes: Sequence[Change]) -> list[str]:
    if not changes:
        return []
    lines = [["case", "method", "old µs", "new µs", "again µs", "change", "why"]]
    for change in changes[:SHOWN]:
        again = "" if change.again_us is None else f"{change.again_us:.2f}"
        times = f"{change.old_us:.2f}", f"{change.new_us:.2f}", again, f"{change.change:+.1%}"
        lines.append([change.case, change.method, *times, change.note])
    more = f"; the {SHOWN} worst of {by_family(changes)}" if len(changes) > SHOWN else ""
    return [f"**{title} ({len(changes)}{more})**", as_markdown(lines)]


def _plain(text: str) -> str:
    """Return a line of text in which nothing begins a tag, a link or emphasis."""
    return printable(text).translate({ord(char): f"\\{char}" for char in "*[]`|"}).replace("<", "&lt;")


def as_junit(comparison: Comparison) -> str:
    """Return JUnit XML: a test per timing; slower and missing ones fail, suspects are skipped with the reason."""
    failed = {change.key: change.text() for change in comparison.regressions}
    failed |= dict.fromkeys(comparison.missing, "asked for and not measured")
    suspect = {change.key: change.text() for change in comparison.suspects}
    judged = [key for key in comparison.new.timings if key in comparison.old.timings and is_kernel(key[1])]
    tests = dict.fromkeys((*judged, *comparison.missing))
    suite = ElementTree.Element("testsuite", name="nsa-sel compare")
    for case, method in tests:
        test = ElementTree.SubElement(suite, "testcase", classname=printable(case), name=printable(method))
        if (case, method) in failed:
            ElementTree.SubElement(test, "failure", message=printable(failed[case, method]))
        elif (case, method) in suspect:
            ElementTree.SubElement(test, "skipped", message=printable(suspect[case, method]))
    verdict = ElementTree.SubElement(suite, "testcase", classname="nsa-sel compare", name="verdict")
    if comparison.exit_code == 1:
        ElementTree.SubElement(verdict, "failure", message=printable(comparison.verdict))
    counts = {"tests": len(suite), "failures": len(suite.findall("*/failure")), "skipped": len(suspect)}
    suite.attrib |= {name: str(count) for name, count in counts.items()}
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
