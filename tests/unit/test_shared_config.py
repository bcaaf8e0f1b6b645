"""Which calls may share tiles of KV, and with which launch; BREAK_EVEN names no GPU yet, so the tests name one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nsa_sel.bench.checks.variants import ARCHITECTURES, SHARED_SAMPLE
from nsa_sel.kernel import shared_config
from nsa_sel.kernel.call import Call
from nsa_sel.kernel.shared_config import choose, default, shared_bytes

H200 = ARCHITECTURES[90][1]
PREFILL = Call(4096 * 4, 16, 128, 128, 16, 1024, shared_kv=True)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(shared_config, "BREAK_EVEN", {gpu.name: 2.5 for pair in ARCHITECTURES.values() for gpu in pair})


def test_prefill_of_a_selections_blocks_shares():
    launch = choose(PREFILL, H200, 4096, 4096)
    assert launch is not None
    assert (launch.rows, launch.queries(16), launch.tma, launch.break_even) == (64, 4, True, 2.5)


@pytest.mark.parametrize(
    ("change", "S"),
    [
        ({"N": 64, "shared_kv": False}, 1),  # decode
        ({"N": 4 * 8}, 8),  # speculative decoding: fewer query tiles than would occupy the GPU
        ({"element_bytes": 4}, 4096),
        ({"n_spans": 128, "max_len": 8192}, 4096),
        ({"n_spans": 64}, 4096),  # spans of 16 tokens: every tile is partial
        ({"N": 1024 * 4, "max_len": 512, "n_spans": 8}, 1024),  # too little work to make up for an index
        ({"H": 32}, 4096),  # two queries, of which the test asks for more than two visits per tile
    ],
)
def test_other_calls_are_computed_row_by_row(change, S, monkeypatch):
    if "H" in change:
        monkeypatch.setattr(shared_config, "BREAK_EVEN", {H200.name: 5.0})
    assert choose(replace(PREFILL, **change), H200, S, 65_536) is None


def test_two_queries_have_too_few_visits_however_many_pairs_there_are():
    call = replace(PREFILL, N=4 * 2 * 512)
    assert choose(replace(call, N=4 * 4 * 512), H200, 4, 1024) is not None
    assert choose(call, H200, 2, 1024) is None


def test_a_context_that_is_long_beside_what_a_row_selects_is_not_indexed():
    assert choose(PREFILL, H200, 4096, 65_536) is not None
    assert choose(PREFILL, H200, 4096, 131_072) is None


def test_one_query_per_tile_has_nothing_to_share():
    assert choose(replace(PREFILL, H=64), H200, 4096, 4096) is None


def test_spans_shorter_than_a_tile_take_smaller_tiles():
    assert default(PREFILL, H200, 2.5).block_t == 64
    assert default(replace(PREFILL, n_spans=32), H200, 2.5).block_t == 32


def test_a_launch_names_all_that_it_is_compiled_with():
    launch = replace(default(PREFILL, H200, 2.5), programs=4, max_registers=168)
    assert str(launch) == "shared R64 BT64 BD128 BDV128 w4 s3+2 tma x2.5 p4 r168"
    assert launch.options == {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
    assert "maxnreg" not in default(PREFILL, H200, 2.5).options


def test_little_work_suffices_where_everything_is_selected():
    call = replace(PREFILL, N=1024 * 4)
    assert choose(call, H200, 1024, 1024) is not None
    assert choose(call, H200, 1024, 8192) is None


def test_visits_of_many_heads_count_for_more():
    thresholds = [default(replace(PREFILL, H=H), H200, 2.0).break_even for H in (1, 16, 32, 64)]
    assert thresholds == [2.0, 2.0, 1.0, 0.5]


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
