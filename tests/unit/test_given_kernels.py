"""The parity suite on kernels that --sel-kernel gives, right ones and wrong ones: each gets the verdict it deserves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch

from nsa_sel import reference
from tests.parity.given_kernel import Broken, watched
from tests.programs import python

ROOT = Path(__file__).parents[2]
KERNELS = """
import torch
from nsa_sel import reference, spans


def right(q, k, v, ranges, *, scale, min_len, max_len):
    out = torch.empty(*q.shape[:4], v.shape[3], dtype=q.dtype, device=q.device)
    for b, s, g in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        index = [t for start, end in ranges[b, s, g].tolist() for t in range(max(start, 0), min(end, k.shape[2]))]
        weights = (q[b, s, g].float() @ k[b, g, index].float().T * scale).softmax(-1)
        out[b, s, g] = (weights @ v[b, g, index].float()).to(q.dtype)  # zeros where nothing is selected
    return out


def by_block(q, k, v, blocks, *, block_size, **options):
    position = torch.arange(k.shape[2] - q.shape[1], k.shape[2], device=q.device).view(1, -1, 1, 1)
    return right(q, k, v, spans.block_ranges(blocks, block_size, position + 1), **options)


def wavers(q, k, v, ranges, **options):
    return right(q * (1 + 1e-6 * torch.rand_like(q)), k, v, ranges, **options)


def drops_last(q, k, v, ranges, **options):
    shorter = ranges.clone()
    shorter[..., 1] -= (shorter[..., 1] > shorter[..., 0]).to(ranges.dtype)
    return right(q, k, v, shorter, **options)


def nan_for_empty(q, k, v, ranges, **options):
    out = right(q, k, v, ranges, **options)
    out[spans.lengths(ranges, k.shape[2]) == 0] = float("nan")
    return out


def only_128(q, k, v, ranges, **options):
    assert q.shape[-1] == 128
    return right(q, k, v, ranges, **options)


only_128.unsupported = lambda q, k, v, ranges: None if q.shape[-1] == 128 else f"D is {q.shape[-1]}, expected 128"


def calls_reference(q, k, v, ranges, *, scale, **lengths):
    return reference.packed_sdpa(q, k, v, ranges, scale=scale, **lengths)


def unwritten(q, k, v, ranges, **options):
    done = right(q, k, v, ranges, **options)
    out = torch.empty_like(done)
    out[..., 1:] = done[..., 1:]
    return out


def writes(q, k, v, ranges, **options):
    k[..., 0] = 0
    return right(q, k, v, ranges, **options)


def raises(q, k, v, ranges, **options):
    raise RuntimeError("no kernel for this shape")


def in_fp32(q, k, v, ranges, **options):
    return right(q, k, v, ranges, **options).float()
"""
NAMES = re.findall(r"^def (\w+)\(q, ", KERNELS, re.MULTILINE)
WHICH = "rows_without_tokens or padded_widths or number_of_spans or dtype1 and (block_layouts or does_not_see)"
CASES = """
cases:
  - {family: decode, distribution: few, H: 4, D: 128, Dv: 64, L: 64, batch: 1, context: 128}
"""


class Outcome(NamedTuple):
    test: str
    verdict: str  # passed, failed or skipped
    said: str


class Finished(NamedTuple):
    folder: Path
    text: str
    outcomes: dict[str, list[Outcome]]  # by kernel


def run(folder: Path, *options: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NSA_", "TRITON_", "PYTEST_"))}
    env["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT / "src")))
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/parity", *options, env=env)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Run a part of the contract on all kernels in one process."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "given_kernels.py").write_text(KERNELS)
    kernels = [option for name in NAMES for option in ("--sel-kernel", f"given_kernels:{name}")]
    report = folder / "report.xml"
    (folder / "cases.yaml").write_text(CASES)
    own = ["--sel-cases", str(folder / "cases.yaml")]
    text = run(
        folder,
        *own,
        "-k",
        f"{WHICH} or own_case",
        "--sel-takes",
        "by_block=blocks:64",
        f"--junitxml={report}",
        *kernels,
    )
    assert report.exists(), text
    outcomes: dict[str, list[Outcome]] = {name: [] for name in NAMES}
    for case in ElementTree.parse(report).iter("testcase"):
        test, kernel = case.attrib["name"], re.search(r"\[(\w+)", case.attrib["name"])[1]
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        verdict = {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad[0].tag] if bad else "passed"
        said = f"{bad[0].attrib['message']}\n{bad[0].text}" if bad else ""
        outcomes[kernel].append(Outcome(test, verdict, said))
    yield Finished(folder, text, outcomes)


def verdicts(outcomes: list[Outcome]) -> set[str]:
    return {outcome.verdict for outcome in outcomes}


def failures(outcomes: list[Outcome]) -> list[str]:
    return [outcome.said for outcome in outcomes if outcome.verdict == "failed"]


@pytest.mark.parametrize("name", ["right", "by_block", "wavers"])
def test_a_right_kernel_passes_all_that_it_takes(finished, name):
    assert verdicts(finished.outcomes[name]) == {"passed"}
    assert re.search(rf"parity of {name} =+\ngiven_kernels:{name}, takes \S+: [1-9]\d* comparisons", finished.text)


def test_what_is_not_for_a_given_kernel_is_deselected_and_counted(finished):
    assert re.search(r"^\d{3} tests of nsa_sel's own kernel deselected$", finished.text, re.MULTILINE)
    assert re.search(
        r"^\d\d tests of by_block deselected: blocks:64 cannot express what they select$", finished.text, re.MULTILINE
    )
    ran = {name: {outcome.test.split("[")[0] for outcome in finished.outcomes[name]} for name in ("right", "by_block")}
    assert ran["right"] - ran["by_block"] == {"test_triton_sel_parity_of_every_number_of_spans"}
    assert "triton_sel_parity" in "".join(ran["by_block"])


def test_a_kernel_that_drops_the_last_token_fails_wherever_there_is_one(finished):
    assert verdicts(finished.outcomes["drops_last"]) == {"failed"}
    assert all("rows are bad" in said for said in failures(finished.outcomes["drops_last"]))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("drops_last", "rows_without_tokens"),
        ("unwritten", "block_layouts"),
        ("drops_last", "own_case_triton_sel_parity"),
    ],
)
def test_the_repro_of_a_failure_runs_as_it_is_printed(finished, name, what):
    start = finished.text.index(f"from given_kernels import {name} as kernel", finished.text.index(f"{what}[{name}"))
    begin = finished.text.rindex("import os, sys", 0, start)
    repro = finished.text[begin : finished.text.index("verdict.message\n", start)] + "verdict.message\n"
    assert len(repro.splitlines()) <= 15
    env = {**os.environ, "PYTHONPATH": str(finished.folder)}
    again = python("-c", repro, env=env)
    last = re.sub(r"^\S+Broken: ", "", again.stderr.splitlines()[-1])
    assert again.returncode == 1 and last in finished.text, again.stderr


def test_a_kernel_that_gives_nan_for_rows_without_tokens_fails_on_those_rows_alone(finished):
    outcomes = finished.outcomes["nan_for_empty"]
    assert verdicts([outcome for outcome in outcomes if "block_layouts" in outcome.test]) == {"passed"}
    of_empty = [outcome for outcome in outcomes if "rows_without_tokens" in outcome.test]
    assert verdicts(of_empty) == {"failed"}
    assert all("values not finite" in said and "row (0, " in said for said in failures(of_empty))


def test_what_a_kernel_declares_unsupported_is_skipped_with_its_reason_and_the_rest_runs_in_what_it_takes(finished):
    outcomes = finished.outcomes["only_128"]
    skipped = [outcome for outcome in outcomes if outcome.verdict == "skipped"]
    assert {outcome.test.split("[")[0] for outcome in skipped} == {"test_triton_sel_parity_of_padded_widths"}
    assert all("only_128: D is 80, expected 128" in outcome.said for outcome in skipped)
    assert verdicts(outcomes) == {"passed", "skipped"}
    assert "tests skipped (3): D is 80, expected 128" in finished.text


def test_a_kernel_that_calls_the_reference_fails_by_name(finished):
    outcomes = finished.outcomes["calls_reference"]
    assert verdicts(outcomes) == {"failed"}
    assert all("it called nsa_sel.reference.packed_sdpa" in said for said in failures(outcomes))
    assert "given_kernels:calls_reference, takes ranges: 0 comparisons" in finished.text


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_a_compiled_kernel_that_calls_the_reference_fails_by_name():
    kernel = torch.compile(lambda q, k, v, ranges, **options: reference.packed_sdpa(q, k, v, ranges), backend="eager")
    q, kv = torch.randn(1, 1, 1, 1, 16), torch.randn(1, 1, 8, 16)
    with pytest.raises(Broken, match=r"it called nsa_sel\.reference\.packed_sdpa"):
        watched(kernel)(q, kv, kv, torch.tensor([0, 8]).view(1, 1, 1, 1, 2))


@pytest.mark.filterwarnings("default")
def test_the_reference_is_compiled_as_before_once_a_kernel_was_watched():
    q, kv, ranges = torch.randn(1, 1, 1, 1, 16), torch.randn(1, 1, 8, 16), torch.tensor([0, 8]).view(1, 1, 1, 1, 2)
    watched(lambda q, k, v, ranges, **options: v[:, None, :, :1].clone())(q, kv, kv, ranges)
    torch._dynamo.reset()
    known = {"min_len": 8, "max_len": 8}
    compiled = torch.compile(lambda *x: reference.packed_sdpa(*x, **known), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, kv, kv, ranges), reference.packed_sdpa(q, kv, kv, ranges))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unwritten", r"out: \d+ of \d+ elements were never written"),
        ("writes", "it wrote into its input k"),
        ("in_fp32", r"out: dtype is torch\.float32, expected torch\.b?float16"),
        ("raises", r"it raised\n.*\n.*line \d+, in raises\n.*\nRuntimeError: no kernel for this shape\n"),
    ],
)
def test_a_failure_says_what_the_kernel_did_in_which_case_and_how_to_see_it_again(finished, name, words):
    said = failures(finished.outcomes[name])
    assert len(said) > len(finished.outcomes[name]) / 2  # in_fp32 is right in fp32
    for text in said:
        assert re.search(rf"{name}: b?float\d\d B\d+ S\d+ G\d H\d+ D\d+ Dv\d+ S_kv\d+ spans\d+.*\n{words}", text), text
        assert f"from given_kernels import {name} as kernel" in text


def test_a_test_that_never_calls_the_given_kernel_fails(finished, tmp_path):
    (tmp_path / "fallback.py").write_text(
        "import pytest\n"
        "@pytest.fixture(autouse=True)\n"
        "def _fallback(monkeypatch):\n"
        "    monkeypatch.setattr('tests.parity.test_layouts.check', lambda case: None)\n"
    )
    (tmp_path / "given_kernels.py").write_text(KERNELS)
    text = run(tmp_path, "-p", "fallback", "-k", "number_of_spans and right-3", "--sel-kernel", "given_kernels:right")
    assert "this test is about right and never called it" in text, text
