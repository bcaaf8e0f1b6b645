"""A failing case prints a repro that runs when pasted and fails in the same way."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from ..programs import python
from . import parity_case
from .launches import small_covering
from .parity_case import DEVICE, Case, check, rows

ROOT = Path(__file__).parents[2]
CASE = Case(rows([(0, 20)], [(3, 9), (12, 40)], [(1, 8)]), 40, seed=5)
pytestmark = pytest.mark.costs(6)  # starts Python anew

# Planted in this process and, before the repro, in the other one: the last token of every span longer than 25 is lost.
FAULT = """
from nsa_sel.kernel import launch as broken
forward = broken.forward
def drop_a_token(q, k, v, ranges, **options):
    long = ranges[..., 1] - ranges[..., 0] > 25
    return forward(q, k, v, ranges - torch.stack((long * 0, long * 1), -1).to(ranges.dtype), **options)
broken.forward = drop_a_token
"""


def paste(code: str) -> CompletedProcess[str]:
    return python("-c", code, cwd=ROOT)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, view="odd", dtype=torch.float32, hints=False),
        replace(CASE, q_factor=40, edit="k[0, 0, 39] = q[0, 1, 0, 0]", dtype=torch.float16),
    ],
    ids=["plain", "odd strides", "large logits"],
)
def test_triton_sel_parity_repro_of_a_planted_fault_reproduces_it(case, monkeypatch):
    from nsa_sel.kernel import launch

    if case.q_factor > 1 and DEVICE == "cpu" and torch.__version__.startswith("2.4."):
        pytest.skip("torch 2.4's SDPA on the CPU overflows in fp16")
    check(case)
    case = replace(case, launch=small_covering()[0])
    monkeypatch.setattr(launch, "forward", launch.forward)  # undone at the end
    exec(FAULT, {"torch": torch})
    with pytest.raises(pytest.fail.Exception) as caught:
        check(case)
    text = str(caught.value)
    repro = text[text.index("import os") :]
    assert len(repro.splitlines()) <= 15
    figures = re.search(r"max error \S+ \(bound [^;]*; worst at [^\n]*", text)
    assert figures is not None

    first, rest = repro.split("\n", 1)
    broken = paste(f"{first}\nimport torch\n{FAULT}\n{rest}")
    assert broken.returncode == 1, broken.stderr
    assert "AssertionError" in broken.stderr
    assert figures[0] in broken.stderr


def test_triton_sel_parity_repro_of_one_row_runs_alone():
    check(CASE)
    assert "ranges = torch.tensor([0, 20" in parity_case.repro(CASE)
    alone = parity_case.repro(replace(CASE, row=(0, 1, 0)))
    assert "torch.tensor([3, 9, 12, 40]" in alone
    sound = paste(alone)
    assert sound.returncode == 0, sound.stderr
