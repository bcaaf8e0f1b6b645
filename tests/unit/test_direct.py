"""The direct launch: it hands the C function what the public launch hands it, and is off where that cannot be said."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import pytest
import torch

from nsa_sel.kernel import direct
from tests.programs import python

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


@pytest.mark.skipif(direct._version() not in direct.ADAPTERS, reason="the direct launch is off with this Triton")
def test_the_direct_launch_hands_over_what_the_public_launch_does(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "src"), "TRITON_CACHE_DIR": str(tmp_path)}
    done = python(Path(__file__).with_name("start_directly.py"), env=env)
    assert done.returncode == 0, done.stderr
    *launches, right, without_clusters = done.stdout.splitlines()
    assert len(launches) == 6 and all(line.endswith(": same") for line in launches), done.stdout
    assert right == "None" and without_clusters == "a direct launch in clusters of 2 writes other values"


@pytest.fixture
def here(monkeypatch):
    """Return a function that sets Triton's version and the self-test, on a machine with or without a GPU."""
    monkeypatch.setattr(direct, "_works", {})
    monkeypatch.setattr(direct.INTERPRETED, "value", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def here(version: str, self_test) -> None:
        monkeypatch.setattr(direct.triton, "__version__", version)
        monkeypatch.setattr(direct, "_self_test", self_test)

    return here


def never(device):
    raise AssertionError("the self-test ran")


@pytest.mark.parametrize("version", ("3.5.1", "3.10.0", "4.0.0+git1234", "3"))
def test_an_unknown_version_is_launched_publicly_without_a_word(here, version):
    here(version, never)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not direct.works(GPU)


@pytest.mark.parametrize("version", ("3.6.0", "3.7.1", "3.8.0", "3.9.0+git1234"))
def test_a_known_version_is_tested_once(here, version):
    asked = []
    here(version, asked.append)
    assert direct.works(GPU) and direct.works(GPU)
    assert asked == [GPU]


def raises(device):
    raise AttributeError("'CudaUtils' object has no\nattribute 'launch'")


@pytest.mark.parametrize(
    ("self_test", "said"),
    ((lambda device: "other values", "other values"), (raises, "AttributeError: 'CudaUtils' object has no attribute")),
    ids=("differs", "raises"),
)
def test_a_self_test_that_fails_is_said_once_and_the_launch_is_public(here, self_test, said):
    here("3.9.0", self_test)
    with pytest.warns(RuntimeWarning, match=f"Triton 3.9.0 is launched through its public interface.*{said}"):
        assert not direct.works(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not direct.works(GPU)


def test_the_self_test_waits_for_the_end_of_a_capture(here, monkeypatch):
    here("3.9.0", lambda device: None)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not direct.works(GPU)
    assert direct.works(GPU)
