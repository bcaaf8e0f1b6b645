"""docs/cards.md: its tables are those of today's rules and kernel, and its formulas hold where a card was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nsa_sel.bench.checks import cards
from nsa_sel.bench.suite import cases
from nsa_sel.bench.tune import space
from nsa_sel.kernel import rules, tuned_table

ROOT = Path(__file__).parents[2]
AGAIN = "python -m nsa_sel.bench.checks.cards docs/cards.md"


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docs/cards.md").read_text(encoding="utf-8")


def test_the_page_is_of_this_kernel(text):
    assert f"from the kernel {tuned_table.kernel_hash()}." in text, f"made from another kernel; again: {AGAIN}"


@pytest.mark.parametrize("card", cards.SHOWN, ids=lambda card: card.name)
def test_the_page_shows_the_launches_that_the_rules_choose(text, card):
    (section,) = re.findall(rf"^### {card.name} .*?(?=^##)", text, re.DOTALL | re.MULTILINE)
    shown = dict(re.findall(r"^\| `(\S+)` \| \S+ \| `([^`]+)` ", section, re.MULTILINE))
    by_id = cases.by_id()
    assert shown == {name: str(rules.choose(space.call_of(by_id[name]), card.gpu)) for name in cards.NAMED}, AGAIN


def test_the_page_shows_what_fits_and_how_long_it_takes(text):
    some = cards.SIZES[0], cards.SIZES[-1]  # a second each
    assert some[0].memory == 16 and some[1].name == "H200"
    for line in (*cards.sizes_table(some).splitlines(), *cards.largest()):
        assert line in text, AGAIN


def test_the_read_limit_is_near_what_an_h200_measured():
    run = next(ROOT.glob(".benchmarks/*-NVIDIA-H200/0001_baseline.json"))
    curve = json.loads(run.read_text())["machine_info"]["calibration"]["read_limit_us"]
    for n_bytes, us in curve:
        if n_bytes > 2e6:  # below, the floor is all there is
            assert cards.read_limit_us(n_bytes, cards.H200_GBPS) == pytest.approx(us, rel=0.04), n_bytes


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ((89, 4, 128, 70 * 1024), (1, "shared memory")),
        ((80, 4, 128, 38 * 1024), (4, "registers")),
        ((90, 4, 40, 1024), (12, "registers")),
        ((80, 16, 32, 1024), (4, "registers")),
        ((89, 16, 32, 1024), (3, "warps")),
        ((90, 1, 32, 1024), (32, "programs")),
    ],
)
def test_what_limits_the_programs_of_an_sm(program, expected):
    assert cards.programs_per_sm(*program) == expected
