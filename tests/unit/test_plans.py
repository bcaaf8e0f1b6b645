"""A plan serves a context that grows: no step is planned or compiled anew, or takes the sizes of another."""

from __future__ import annotations

import pytest
import torch

import nsa_sel
from nsa_sel import dispatch
from nsa_sel.kernel import device, direct, kv, launch
from nsa_sel.kernel.forward import TENSOR_ARGS
from nsa_sel.kernel.kv import lie_of
from nsa_sel.kernel.launch_config import LaunchConfig

B, G, H, D = 2, 3, 4, 64
ROOM = 3000  # tokens that the cache has room for


class Kernel:
    """Stand in for the kernel, its public and its direct launch: note what they are asked for."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names = arg_names
        self.compiled: list[dict] = []  # arguments by name, for each public launch
        self.started: list[tuple] = []  # arguments of each direct launch
        self.described: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.compiled.append(
            dict(zip(self.arg_names, arguments, strict=True)) | options
        )

    def direct_launch(self, compiled, cluster):
        describe = self.describe if self.compiled[-1]["LOAD"] == "tma" else None
        return direct.Direct(lambda *arguments: self.started.append(arguments[-1]), (), True, describe, None)

    def describe(self, *what):
        self.described.append(what)
        return what[:4]

    def passed(self, *names):
        """Return some arguments of the last direct launch: of all but the tensors, which stand first."""
        values = self.started[-1][len(TENSOR_ARGS) - len(self.arg_names) :]
        return [values[self.arg_names.index(name) - len(TENSOR_ARGS)] for name in names]


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel(launch._sel_fwd.arg_names)
    monkeypatch.setattr(launch, "_sel_fwd", kernel)
    for module in (launch, device):
        monkeypatch.setattr(module, "INTERPRETED", True)  # tensors of the CPU
    monkeypatch.setattr(launch, "unsupported_reason", lambda *tensors: None)
    monkeypatch.setattr(dispatch, "_plans", {})
    monkeypatch.setattr(direct, "works", lambda device: True)
    monkeypatch.setattr(direct, "direct_launch", kernel.direct_launch)
    return kernel


CACHE = torch.zeros(2, B, G, ROOM, D)
Q, RANGES = torch.zeros(B, 1, G, H, D), torch.zeros(B, 1, G, 5, 2, dtype=torch.int32)


def at(t: int, k=None, v=None, ranges=RANGES, **hints) -> None:
    k, v = (x if given is None else given for x, given in zip(CACHE[:, :, :, :t], (k, v), strict=True))
    nsa_sel.selection_attention(Q, k, v, ranges, backend="triton", **hints)


def plans() -> list[launch.Plan]:
    return [plan for _, known in dispatch._plans.values() for plan in known]


def test_a_thousand_steps_need_one_plan_and_one_kernel(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MAX_KEPT", 64)
    monkeypatch.setattr(launch, "launch_for", lambda *tensors, **hints: LaunchConfig("tma", 64, 64, 64, 4, 2))
    for t in range(1500, 2500):
        at(t, min_len=80, max_len=80)
    assert len(plans()) == 1 and len(kernel.compiled) == 1
    lengths = [arguments[8 + 2 * 4 + 3] for arguments in kernel.started]  # after pointers, descriptors, scale, S and G
    assert lengths == list(range(1501, 2500))
    rows = [what[1] for what in kernel.described]
    assert rows == [(B * G - 1) * ROOM + t for t in range(1501, 2500) for _ in "kv"]
    assert len(plans()[0].descriptors) <= 64


def test_a_length_that_was_seen_keeps_its_descriptors(kernel, monkeypatch):
    monkeypatch.setattr(launch, "launch_for", lambda *tensors, **hints: LaunchConfig("tma", 64, 64, 64, 4, 2))
    for t in (100, 100, 101, 100, 101, 100):
        at(t, max_len=80)
    assert [what[1] - (B * G - 1) * ROOM for what in kernel.described] == [100, 100, 101, 101]
    assert [arguments[9] - (B * G - 1) * ROOM for arguments in kernel.started] == [100, 101, 100, 101, 100]


@pytest.mark.parametrize("load", ("tma", "whole"))
def test_a_cache_that_torch_cat_makes_anew_each_step_needs_one_plan_and_one_kernel(kernel, monkeypatch, load):
    monkeypatch.setattr(launch, "launch_for", lambda *tensors, **hints: LaunchConfig(load, 64, 64, 64, 4, 2))
    cache = CACHE[:, :, :, :90]
    for t in range(91, 200):
        cache = torch.cat((cache, CACHE[:, :, :, t : t + 1]), 3)
        at(t, *cache, max_len=80)
        if t > 91:
            strides = [G * t * D // 16, t * D // 16]
            assert kernel.passed("S_kv", "stride_kb", "stride_kg", "stride_vb", "stride_vg") == [t, *strides, *strides]
    assert len(plans()) == 1 and len(kernel.compiled) == 1 and len(kernel.started) == 108
    assert [what[1] for what in kernel.described[::2]] == [B * G * t for t in range(92, 200)] * (load == "tma")


def test_two_caches_in_turn_keep_each_its_strides(kernel):
    wide = torch.zeros(2, B, G + 1, 2 * ROOM, D)
    for _ in range(3):
        at(500, max_len=80)
        of_narrow = kernel.started and kernel.passed("stride_vb", "stride_vg")
        at(500, *wide[:, :, 1:, :500], max_len=80)
        assert kernel.passed("stride_vb", "stride_vg") == [(G + 1) * 2 * ROOM * D // 16, 2 * ROOM * D // 16]
    assert of_narrow == [G * ROOM * D // 16, ROOM * D // 16]
    assert len(plans()) == 1 and len(kernel.compiled) == 1 and len(plans()[0].places.kept) == 2


def test_a_plan_keeps_no_more_places_than_it_may(kernel, monkeypatch):
    monkeypatch.setattr(kv, "MAX_PLACES", 8)
    for t in range(500, 600):
        at(t, max_len=80)
    assert len(plans()) == 1 and len(plans()[0].places.kept) <= 8


TOKENS_BESIDE_GROUPS = torch.zeros(2, B, 500, G, D).transpose(2, 3)
NO_WHOLE_ROWS = torch.zeros(2, B, G * ROOM * D + 16)[:, :, :-16].unflatten(2, (G, ROOM, D))[:, :, :, :500]
ODD = torch.zeros(2, B, G * ROOM * D + 2)[:, :, :-2].unflatten(2, (G, ROOM, D))[:, :, :, :500]
FAR_TOKENS = torch.zeros(2, B, G, 500, 2 * D)[..., :D]


@pytest.mark.parametrize("other", (TOKENS_BESIDE_GROUPS, NO_WHOLE_ROWS, ODD, FAR_TOKENS))
def test_what_lies_so_that_another_kernel_is_due_has_its_own_plan(kernel, other):
    for _ in range(3):
        at(500, max_len=80)
        at(500, *other, max_len=80)
    assert len(plans()) == 2 and len(kernel.compiled) == 2 and len(kernel.started) == 4


def test_calls_in_turn_that_two_plans_serve_are_looked_at_once(kernel, monkeypatch):
    """Of the first plan, too, each call knows that it does not serve the other's K and V."""
    for case in ("known", "again"):
        at(500, max_len=80)
        at(500, *NO_WHOLE_ROWS, max_len=80)
        if case == "known":
            monkeypatch.setattr(kv, "as_matrices", None)  # not looked at again
    assert len(plans()) == 2 and len(kernel.started) == 2


def test_without_max_len_the_launch_follows_the_context_from_power_to_power_of_two(kernel):
    for t in range(600, 2600, 10):
        at(t)
        k, v = CACHE[:, :, :, :t]
        (plan,) = (plan for plan in plans() if plan.places.find(lie_of(k, v)))
        assert plan.config == launch.launch_for(Q, k, v, RANGES)
    assert sorted(plan.places.lengths.stop for plan in plans()) == [1024, 2048, 4096]


def test_positions_that_pass_32_bits_take_another_kernel_and_back(kernel):
    ranges = torch.zeros(B, 1, G, 1024, 2, dtype=torch.int32)
    token = torch.zeros(B, G, 1, D)  # as many tokens as one likes, without their memory
    edge = (2**31 - 1) // 1024 - 64
    for S_kv in (edge, edge + 128, edge - 1, edge + 129):
        expanded = token.expand(B, G, S_kv, D)
        at(S_kv, k=expanded, v=expanded, ranges=ranges, min_len=8, max_len=8)
    assert [arguments["WIDE"] for arguments in kernel.compiled] == [False, True]
    assert len(kernel.started) == 2


@pytest.mark.parametrize(
    ("k", "v", "said"),
    (
        (CACHE[0, :, :, :90], CACHE[1, :, :, :91], r"v: shape is \(2, 3, 91, 64\), expected \(2, 3, 90, 64\)"),
        (CACHE[0, :1, :, :90], CACHE[1, :1, :, :90], r"k: shape is \(1, 3, 90, 64\), expected \(2, 3, 90, 64\)"),
        (CACHE[0, :, :2, :90], CACHE[1, :, :2, :90], r"k: shape is \(2, 2, 90, 64\), expected \(2, 3, 90, 64\)"),
        (CACHE[0, :, :, :90, :32], CACHE[1, :, :, :90], r"k: shape is \(2, 3, 90, 32\), expected \(2, 3, 90, 64\)"),
    ),
    ids=("lengths", "batch", "groups", "width"),
)
def test_a_known_plan_does_not_spare_k_and_v_the_check_that_they_agree(kernel, k, v, said):
    at(90, min_len=8, max_len=8)
    with pytest.raises(ValueError, match=said):
        at(90, k=k, v=v, min_len=8, max_len=8)
    at(91, min_len=8, max_len=8)
    assert len(plans()) == 1 and len(kernel.started) == 1
