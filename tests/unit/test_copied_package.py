"""A plain copy of the package's folder works under any name: nothing in it knows its own name or its repository."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import nsa_sel
from tests.programs import needs_interpreter, python

PACKAGE = Path(nsa_sel.__file__).parent
CALL = """
import sys
sys.modules["nsa_sel"] = None  # to import it is an error
import torch
import other_name
q, kv = torch.randn(1, 2, 1, 4, 16), torch.randn(1, 1, 40, 16)
ranges = torch.tensor([[0, 9], [20, 40]]).expand(1, 2, 1, 2, 2)
out = other_name.selection_attention(q, kv, kv, ranges, backend=sys.argv[1])
assert (out - other_name.reference.oracle(q, kv, kv, ranges)).abs().max() < 1e-5
assert other_name.SelConfig.load().sources["use_triton_sel"].endswith("other_name/base.yaml")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "other_name", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(copy: Path, *arguments: str, **environment: str) -> CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NSA_", "PYTHONPATH", "TRITON"))}
    env |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    done = python(*arguments, cwd=copy, env=env)
    assert done.returncode == 0, done.stderr
    return done


def test_a_copy_attends_without_the_original(copy: Path):
    run(copy, "-c", CALL, "packed_sdpa")


@needs_interpreter
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_a_copy_has_the_kernel(copy: Path):
    run(copy, "-c", CALL, "triton", TRITON_INTERPRET="1")


def test_a_copy_has_the_command_and_its_verbs(copy: Path):
    hidden = (
        "import sys; sys.modules['nsa_sel'] = None; from other_name.bench import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    assert "Toggles" in run(copy, "-m", "other_name").stdout
    assert "nsa-sel compare" in run(copy, "-c", hidden, "compare", "--help").stdout
    assert (copy / "other_name/bench/compare/noise.json").is_file()


def test_a_copy_compiles_with_its_own_workers(copy: Path):
    command = "from other_name.bench.tune import workers; print(*workers.COMMAND[1:])"
    assert run(copy, "-c", command).stdout.split() == ["-m", "other_name.bench.tune.workers"]
