"""Which calls may share tiles of KV, and with which launch; each GPU that is compiled for counts as a measured one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_sel.bench.checks.variants import ARCHITECTURES, SHARED_SAMPLE
from nsa_sel.kernel import shared_config, shared_launch
from nsa_sel.kernel.call import Call
from nsa_sel.kernel.shared_config import BREAK_EVEN, choose, default, shared_bytes

H200 = ARCHITECTURES[90][1]
PREFILL = Call(4096 * 4, 16, 128, 128, 16, 1024, shared_kv=True)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(shared_config, "BREAK_EVEN", {gpu.name: 2.5 for pair in ARCHITECTURES.values() for gpu in pair})


def test_prefill_of_a_selections_blocks_shares():
    launch = choose(PREFILL, H200, 4096, 4096)
    assert launch is not None
    assert (launch.rows, launch.queries(16), launch.tma, launch.break_even) == (64, 4, True, 2.5)


def test_only_measured_gpus_share_tiles(monkeypatch):
    monkeypatch.setattr(shared_config, "BREAK_EVEN", measured_on := {"NVIDIA H200": 1.6})
    assert measured_on == BREAK_EVEN
    q = torch.empty(1, 4096, 4, 16, 128, dtype=torch.float16, device="meta")
    k = torch.empty(1, 4, 4096, 128, dtype=torch.float16, device="meta")
    ranges = torch.empty(1, 4096, 4, 16, 2, dtype=torch.int32, device="meta")
    for name, expected in (("NVIDIA H200", 1.6), ("NVIDIA H100 80GB HBM3", None), ("NVIDIA A100-SXM4-80GB", None)):
        monkeypatch.setattr(shared_launch, "gpu_of", lambda device, name=name: replace(H200, name=name))
        launch = shared_launch.eligible(q, k, k, ranges, None, None, 1024)
        assert (launch and launch.break_even) == expected


@pytest.mark.parametrize(
    ("change", "S"),
    [
        ({"N": 64, "shared_kv": False}, 1),  # decode
        ({"N": 4 * 8}, 8),  # speculative decoding: fewer query tiles than would occupy the GPU
        ({"element_bytes": 4}, 4096),
        ({"n_spans": 128, "max_len": 8192}, 4096),
        ({"n_spans": 64}, 4096),  # spans of 16 tokens: every tile is partial
        ({"N": 1024 * 4, "max_len": 512, "n_spans": 8}, 1024),  # too little work to make up for an index
        ({"H": 32}, 4096),  # two queries per tile
    ],
)
def test_other_calls_are_computed_row_by_row(change, S):
    assert choose(PREFILL, H200, 4096, 4096) is not None
    assert choose(replace(PREFILL, **change), H200, S, 4096) is None


def test_short_rows_are_indexed_only_where_so_much_is_selected_that_queries_must_share():
    call = replace(PREFILL, N=4096 * 16, max_len=512, n_spans=8)
    assert choose(call, H200, 4096, 4096) is None
    assert choose(replace(call, H=4), H200, 2048, 2048) is not None


def test_the_end_of_a_long_prefill_is_computed_row_by_row_unless_so_much_is_selected_that_all_share():
    call = replace(PREFILL, N=8192 * 4)
    assert choose(call, H200, 8192, 8192) is not None
    assert choose(call, H200, 8192, 8256) is None
    assert choose(replace(call, max_len=8192, n_spans=64), H200, 8192, 8256) is not None


@pytest.mark.parametrize(
    ("S", "shares"), [(2, False), (3, False), (4, True), (5, False), (6, False), (7, True), (8, True), (64, True)]
)
def test_few_queries_share_where_they_fill_their_query_tiles(S, shares):
    assert (choose(replace(PREFILL, N=4 * S * 512), H200, S, 1024) is not None) == shares


def test_a_context_that_is_long_beside_what_a_row_selects_is_not_indexed():
    assert choose(replace(PREFILL, N=4 * 32_768), H200, 32_768, 32_768) is not None
    assert choose(replace(PREFILL, N=4 * 32_832), H200, 32_832, 32_832) is None


def test_one_query_per_tile_has_nothing_to_share():
    assert choose(replace(PREFILL, H=64), H200, 4096, 4096) is None


def test_spans_shorter_than_a_tile_take_smaller_tiles():
    assert default(PREFILL, H200, 2.5).block_t == 64
    assert default(replace(PREFILL, n_spans=32), H200, 2.5).block_t == 32


def test_a_launch_names_all_that_it_is_compiled_with():
    launch = replace(default(PREFILL, H200, 2.5), max_registers=168)
    assert str(launch) == "shared R64 BT64 BD128 BDV128 w4 s3+2 tma x2.5 r168"
    assert launch.options == {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
    assert "maxnreg" not in default(PREFILL, H200, 2.5).options


def test_little_work_suffices_where_everything_is_selected():
    call = replace(PREFILL, N=1024 * 4)
    assert choose(call, H200, 1024, 1024) is not None
    assert choose(call, H200, 1024, 8192) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_launch_that_is_chosen_fits_into_shared_memory(arch):
    for gpu in ARCHITECTURES[arch]:
        chosen = [(call, choose(call, gpu, 16_384, 16_384)) for call in SHARED_SAMPLE]
        fitting = [(call, launch) for call, launch in chosen if launch is not None]
        assert len(fitting) >= 4
        for call, launch in fitting:
            assert shared_bytes(launch, call.D, call.Dv, 2) <= gpu.shared_bytes
            assert launch.problem(call.H, call.D, call.Dv) is None
            assert launch.tma == gpu.has_tma
