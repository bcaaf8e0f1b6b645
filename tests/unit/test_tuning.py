"""The launch decision, without a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from nsa_sel.kernel import rules
from nsa_sel.kernel.call import Call, Gpu
from nsa_sel.kernel.launch_config import (
    MAX_CHUNKS,
    MAX_SPANS,
    SPAN_BUCKETS,
    LaunchConfig,
    chunk_width,
    shared_memory,
)

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", 108, 163 * 1024, has_tma=False, has_clusters=False),
        Gpu("sm_89", 128, 99 * 1024, has_tma=False, has_clusters=False),
        Gpu("sm_90", 132, 227 * 1024, has_tma=True, has_clusters=True),
        Gpu("sm_90 without clusters", 132, 227 * 1024, has_tma=True, has_clusters=False),
        Gpu("sm_120", 188, 99 * 1024, has_tma=True, has_clusters=False),
    )
}
CALL = Call(N=1024, H=8, D=128, Dv=128, n_spans=8, max_len=1024)


def choose(gpu: str, **change) -> LaunchConfig:
    return rules.choose(replace(CALL, **change), GPUS[gpu])


@pytest.mark.parametrize("gpu", GPUS)
def test_every_choice_can_run(gpu):
    facts = GPUS[gpu]
    calls = itertools.product(
        (0, 1, 4, 16, 32, 64, 256, 16384), (1, 4, 17, 64), (16, 80, 128, 192, 256), (16, 128, 256), (1, 8, 16, 1024),
        (0, 1, 16, 64, 512, 1000, 1024, 65536), (False, True), (2, 4), (False, True),
    )  # fmt: skip
    seen = set()
    for N, H, D, Dv, n_spans, max_len, shared_kv, element_bytes, one_length in calls:
        config = choose(
            gpu,
            N=N,
            H=H,
            D=D,
            Dv=Dv,
            n_spans=n_spans,
            max_len=max_len,
            shared_kv=shared_kv,
            element_bytes=element_bytes,
            one_length=one_length,
        )
        seen.add(config)
        assert config.load != "tma" or facts.has_tma
        assert shared_memory(config, H, D, Dv, element_bytes) <= facts.shared_bytes, config
        assert config.block_d * MAX_CHUNKS >= D
        assert config.block_dv * MAX_CHUNKS >= Dv
        assert config.cluster == 1 or facts.has_clusters
        assert config.cluster in (1, 2, 4, 8) and config.splits % config.cluster == 0 and config.splits <= 64
        most = 8 if n_spans == 1 and not one_length else 2  # programs a multiprocessor; of unequal rows most end early
        assert config.splits == 1 or (N * config.splits <= most * facts.sm_count and max_len >= 64 * config.splits)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("H", "D", "Dv", "launch", "compiled"),
    [
        (64, 256, 64, ("gather", 32, 256, 64, 4, 2), 114_944),
        (16, 128, 48, ("whole", 64, 128, 16, 4, 3), 102_400),
        (17, 256, 32, ("whole", 64, 256, 32, 4, 2), 114_816),
        (64, 256, 256, ("whole", 16, 256, 256, 4, 1), 102_656),
        (64, 256, 256, ("gather", 16, 256, 256, 4, 1), 86_272),
    ],
)
def test_the_estimate_for_fp32_is_not_below_what_was_compiled_for_sm_89(H, D, Dv, launch, compiled):
    estimate = shared_memory(LaunchConfig(*launch), H, D, Dv, 4)
    assert compiled <= estimate <= 1.1 * compiled


@pytest.mark.parametrize("width", range(16, 257, 16))
def test_chunks_cover_a_width_with_little_padding(width):
    chunk = chunk_width(width)
    chunks = -(-width // chunk)
    assert chunks <= MAX_CHUNKS
    assert chunk & (chunk - 1) == 0
    assert chunks * chunk - width < max(chunk, 64)
    assert chunk_width(192) == 64


def test_few_long_rows_are_split_and_many_are_not():
    gpu = "sm_90 without clusters"
    assert choose(gpu, N=4, max_len=65536, n_spans=1).splits == 33
    assert choose(gpu, N=64, max_len=1024).splits == 2
    one = {"n_spans": 1, "one_length": True}
    assert choose(gpu, N=64, max_len=1024, **one).splits == 1  # here one program a row in large tiles is faster
    assert choose(gpu, N=64, max_len=256).splits == 1
    assert choose(gpu, N=1024, max_len=1024).splits == 1


@pytest.mark.parametrize(
    ("N", "n_spans", "max_len", "splits", "cluster"),
    [
        (4, 16, 1024, 8, 8),  # decode
        (32, 16, 1024, 8, 8),
        (256, 16, 1024, 1, 1),
        (4, 8, 512, 8, 8),
        (64, 8, 1024, 2, 2),
        (4, 64, 4096, 16, 8),  # more clusters than one a row
        (4, 1024, 65536, 32, 2),  # every multiprocessor streams many tiles: pairs, which fit anywhere
        (4, 1, 65536, 16, 8),  # a cluster of 8 for each 16 multiprocessors
        (8, 1, 16384, 8, 8),
        (3, 1, 65536, 40, 2),  # 3 rows cannot have as many clusters each
        (1, 1, 16384, 64, 8),
        (16, 1, 1024, 4, 4),
        (4, 1, 256, 1, 1),
    ],
)
def test_parts_of_few_rows_merge_as_clusters(N, n_spans, max_len, splits, cluster):
    call = {"N": N, "H": 16, "n_spans": n_spans, "max_len": max_len, "one_length": True}
    config = choose("sm_90", **call)
    assert (config.splits, config.cluster) == (splits, cluster)
    assert choose("sm_90", **call, fits_tma=False).cluster == 1  # K or V that no descriptor fits: not measured


def test_one_cluster_a_row_needs_no_counters():
    """Captured calls have few to give away, and past them each graph sets its own to zero."""
    counters = {
        (splits, cluster): LaunchConfig("tma", 64, 128, 128, 4, 3, splits, 0, cluster).counters
        for splits, cluster in ((8, 8), (16, 8), (8, 1), (2, 2), (4, 2))
    }
    assert counters == {(8, 8): 0, (16, 8): 8, (8, 1): 1, (2, 2): 0, (4, 2): 2}


def test_all_blocks_of_512_rows_find_a_place_at_once():
    """Four programs a multiprocessor, of at most a quarter of its 227 KB."""
    config = choose("sm_90", N=512, H=16, n_spans=16, max_len=1024)
    assert 4 * shared_memory(config, 16, 128, 128, 2) <= 227 * 1024, config


def test_programs_of_large_clusters_leave_room_for_a_second_on_their_multiprocessor():
    """Not every group of multiprocessors is a multiple of a cluster; what is left over must not wait for a turn."""
    for N, n_spans, max_len, D in itertools.product((1, 4, 8, 16, 32), (1, 8, 16, 64), (512, 1024, 4096), (64, 128)):
        config = choose("sm_90", N=N, D=D, Dv=D, n_spans=n_spans, max_len=max_len, one_length=True)
        if config.cluster > 2 and 2 * N * config.splits > 132:
            assert 2 * shared_memory(config, 8, D, D, 2) <= 227 * 1024, config


@pytest.mark.parametrize("change", [{"one_length": False}, {"max_len": 1000}, {"n_spans": 4}])
def test_tiles_longer_than_64_are_for_rows_that_they_fill(change):
    """What is left of a row would be read in small ones."""
    call = {"N": 64, "n_spans": 1, "max_len": 1024, "one_length": True}
    gpu = "sm_90 without clusters"
    assert choose(gpu, **call).load == "tma" and choose(gpu, **call).block_l > 64
    config = choose(gpu, **{**call, **change})
    assert config.load == "gather" or config.block_l == 64


def test_rows_of_unequal_lengths_are_split_for_the_longest():
    call = {"N": 256, "n_spans": 1, "max_len": 2896}
    assert choose("sm_90", **call, one_length=True).splits == 1
    assert (choose("sm_90", **call).splits, choose("sm_90", **call).cluster) == (4, 4)
    assert choose("sm_90", **{**call, "N": 1024}).splits == 1
    assert choose("sm_90", **{**call, "max_len": 181}).load == "gather"


def test_prefill_runs_one_warp_a_program_through_whole_tiles():
    call = {"N": 16384, "H": 16, "n_spans": 16, "max_len": 1024, "shared_kv": True}
    assert (choose("sm_90", **call).load, choose("sm_90", **call).num_warps) == ("tma", 1)
    assert (choose("sm_80", **call).load, choose("sm_80", **call).num_warps) == ("whole", 1)


def test_short_spans_are_gathered():
    assert choose("sm_90", max_len=64, n_spans=8).load == "gather"
    assert choose("sm_90", max_len=1024, n_spans=1024).load == "gather"


def test_the_span_count_is_compiled_in_few_buckets():
    config = choose("sm_90")
    compiled = {config.constants(8, 128, n_spans)["BLOCK_N"] for n_spans in range(MAX_SPANS + 1)}
    assert compiled == set(SPAN_BUCKETS)
