"""What a process may find around it: folders, defaults of PyTorch, forked workers, deterministic mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mode_case import DEVICE, ON_GPU, assert_right, call, each_backend, environment, hinted_or_not
from mode_case import inputs as make_inputs

from nsa_sel import spans
from tests.programs import python

HERE = Path(__file__).parent
WARNINGS_ARE_ERRORS = """
import warnings
warnings.simplefilter("error")
# Triton's interpreter before 3.7 does what NumPy 1.25 to 2.3 warns of, and later NumPy refuses.
warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
"""
PROGRAM = """
import os, sys
import torch
torch.ones(2, 2) @ torch.ones(2, 2)  # whose libraries look for the working directory
if sys.argv[1] == "gone":
    os.rmdir(os.getcwd())
sys.path.insert(0, sys.argv[2])
from mode_case import BACKENDS, assert_right, call, inputs
for backend in BACKENDS:
    assert_right(call(backend)(*inputs()), *inputs())
"""


@pytest.mark.parametrize(
    ("home", "folder"), [("missing", "usual"), ("a_file", "gone"), ("unset", "gone"), ("of_nobody", "usual")]
)
def test_a_process_without_a_home_or_a_working_directory(home, folder, tmp_path):
    """What is compiled cannot be kept in such a home; then TRITON_CACHE_DIR says where."""
    there = tmp_path / "there"
    there.mkdir()
    a_file = tmp_path / "file"
    a_file.touch()
    homes = {"missing": "/nonexistent/home", "a_file": str(a_file), "of_nobody": "/proc/self"}
    env = {name: value for name, value in environment().items() if name not in ("HOME", "XDG_CACHE_HOME")}
    env |= {"HOME": homes[home]} if home != "unset" else {}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "kept")} if ON_GPU else {"TRITON_INTERPRET": "1"}
    done = python("-c", WARNINGS_ARE_ERRORS + PROGRAM, folder, HERE, cwd=there, env=env)
    assert done.returncode == 0, done.stderr


@each_backend
@hinted_or_not
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_another_default_dtype_changes_nothing(backend, hints, dtype):
    args = make_inputs()
    want = call(backend, return_lse=True, **hints)(*args)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = call(backend, return_lse=True, **hints)(*args)
    finally:
        torch.set_default_dtype(before)
    for mine, expected in zip(got, want, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


@each_backend
@hinted_or_not
def test_another_default_device_changes_nothing(backend, hints):
    args = make_inputs()
    want = call(backend, return_lse=True, **hints)(*args)
    blocks = torch.arange(3, device=DEVICE).view(1, 1, 1, 3)
    with torch.device("meta"):
        got = call(backend, return_lse=True, **hints)(*args)
        assert spans.block_ranges(blocks, 4, 11, offset=2, unique=True).device == blocks.device
    for mine, expected in zip(got, want, strict=True):
        assert mine.device == expected.device
        assert torch.equal(mine, expected)


def test_another_default_device_is_not_that_of_a_workspace():
    from nsa_sel.kernel import launch
    from nsa_sel.kernel.launch_config import LaunchConfig

    args = make_inputs()
    with torch.device("meta"):
        out = launch.forward(*args, launch=LaunchConfig("gather", 16, 16, 16, 1, 1, splits=2))
    assert_right(out, *make_inputs())


def test_a_default_device_costs_no_call_its_plan(monkeypatch):
    from nsa_sel.kernel import shared_launch

    args = make_inputs()
    call("triton")(*args)
    monkeypatch.setattr(shared_launch, "plan_for", None)  # making another would fail
    with torch.device(DEVICE):
        assert_right(call("triton")(*args), *args)


@each_backend
@pytest.mark.parametrize("backend_grad", (True, False), ids=("gradients", "no_gradients"))
def test_deterministic_mode(backend, backend_grad):
    def run():
        q, k, v, ranges = make_inputs()
        leaves = [x.requires_grad_(backend_grad) for x in (q, k, v)]
        out = call(backend)(q, k, v, ranges)
        return [out, *(torch.autograd.grad(out.sin().sum(), leaves) if backend_grad else ())]

    want = run()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y, expected in zip(first, second, want, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


def test_the_kernel_in_deterministic_mode():
    args = make_inputs()
    want = call("triton")(*args)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(call("triton")(*args), want)
    finally:
        torch.use_deterministic_algorithms(False)


FORKS = """
import sys
sys.path.insert(0, sys.argv[1])
import mode_case
from mode_case import BACKENDS, HINTS, assert_right, call
mode_case.DEVICE = "cpu"
import torch
args = mode_case.inputs()
backends = [b for b in BACKENDS if b != "triton" or not torch.cuda.is_available()]
def work(_):
    torch.set_num_threads(1)
    for backend in backends:
        for hints in HINTS:
            assert_right(call(backend, **hints)(*args), *args)
    return 1
work(0)
if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    with torch.multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, range(4)) == [1] * 4
"""


def test_forked_workers():
    """As a data loader's: they compute on the CPU, whatever their parent has done on a GPU."""
    env = environment() | {"OMP_NUM_THREADS": "1"}
    env |= {} if ON_GPU else {"TRITON_INTERPRET": "1"}
    done = python("-c", WARNINGS_ARE_ERRORS + FORKS, HERE, env=env)
    assert done.returncode == 0, done.stderr
