"""The rules that choose a launch, without a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nsa_sel.kernel import rules
from nsa_sel.kernel.call import Call, Gpu
from nsa_sel.kernel.launch_config import MAX_CHUNKS, LaunchConfig, shared_memory

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


# Of each argument the values at the rules' borders, least first and greatest last, and any between. max_len stays at
# its borders: rows of other lengths may be cut into parts of less than a tile, which is slow and not wrong.
CALLS = {
    "N": ((0, 1, 4, 16, 32, 64, 256, 16384), range(16384)),
    "H": ((1, 4, 17, 64), range(1, 65)),
    "D": ((16, 80, 128, 192, 256), range(16, 257, 16)),
    "Dv": ((16, 128, 256), range(16, 257, 16)),
    "n_spans": ((1, 8, 16, 1024), range(1, 1025)),
    "max_len": ((0, 1, 16, 32, 64, 256, 512, 1000, 1024, 65536),),
    "shared_kv": ((False, True),),
    "element_bytes": ((2, 4),),
    "one_length": ((False, True),),
    "fits_tma": ((False, True),),
}


def calls(draws: int) -> Iterator[Call]:
    """Yield every call of least and greatest values, then so many random ones, the same each time."""
    for corner in itertools.product(*((borders[0], borders[-1]) for borders, *_ in CALLS.values())):
        yield Call(**dict(zip(CALLS, corner, strict=True)))
    dice = random.Random(0)
    for _ in range(draws):
        yield Call(**{name: dice.choice(dice.choice(values)) for name, values in CALLS.items()})


@pytest.mark.parametrize("gpu", GPUS)
def test_every_choice_can_run(gpu):
    facts = GPUS[gpu]
    seen = set()
    for call in calls(10_000):
        config = rules.choose(call, facts)
        seen.add(config)
        assert config.problem(call.D, call.Dv) is None
        assert config.load != "tma" or (facts.has_tma and call.fits_tma)
        assert shared_memory(config, call.H, call.D, call.Dv, call.element_bytes) <= facts.shared_bytes, config
        assert config.block_d * MAX_CHUNKS >= call.D
        assert config.block_dv * MAX_CHUNKS >= call.Dv
        assert config.cluster == 1 or facts.has_clusters
        assert config.cluster in (1, 2, 4, 8) and config.splits % config.cluster == 0 and config.splits <= 64
        # Programs a multiprocessor; of unequal rows most end early.
        most = 8 if call.n_spans == 1 and not call.one_length else 2
        few = call.N * config.splits <= most * facts.sm_count
        assert config.splits == 1 or (few and call.max_len >= 64 * config.splits), call
    assert len(seen) > 10


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
        (4, 1, 65536, 32, 2),
        (8, 1, 16384, 16, 2),
        (3, 1, 65536, 40, 2),  # 3 rows cannot have as many clusters each
        (1, 1, 16384, 64, 8),
        (16, 1, 1024, 8, 8),
        (16, 1, 8192, 16, 8),  # two programs a multiprocessor
        (4, 1, 512, 4, 4),  # parts of a large tile at least
        (32, 1, 512, 4, 4),
        (32, 1, 1024, 4, 1),  # each an SM of its own, where clusters of 4 would not all find a place
        (64, 1, 1024, 1, 1),
        (4, 1, 256, 1, 1),
        (1, 1, 4096, 64, 8),  # a single row on half of the SMs
        (48, 8, 1024, 2, 2),
        (48, 8, 4096, 4, 4),
        (100, 8, 4096, 2, 2),
    ],
)
def test_parts_of_few_rows_merge_as_clusters(N, n_spans, max_len, splits, cluster):
    call = {"N": N, "H": 16, "n_spans": n_spans, "max_len": max_len, "one_length": True}
    config = choose("sm_90", **call)
    assert (config.splits, config.cluster) == (splits, cluster)
    assert choose("sm_90", **call, fits_tma=False).cluster == 1  # K or V that no descriptor fits: not measured


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


@pytest.mark.parametrize("H", [17, 40])
def test_few_rows_of_many_heads_are_split_as_clusters(H):
    config = choose("sm_90", N=8, H=H, n_spans=3, max_len=1024)
    assert (config.splits, config.cluster) == (8, 8)


def test_products_of_more_than_32_heads_by_four_warps_are_fed_by_gathers():
    """Not by TMA: where K and V have chunks of two widths, the compiler of Triton 3.6 reads tails from elsewhere."""
    for call in calls(3000):
        config = rules.choose(call, GPUS["sm_90"])
        assert call.H <= 32 or config.num_warps % 4 or config.load != "tma", call


def test_many_rows_of_many_blocks_run_one_warp_a_program_through_tiles_of_32():
    call = {"N": 832, "H": 2, "D": 32, "Dv": 48, "n_spans": 207, "max_len": 8095}
    config = choose("sm_90", **call, shared_kv=True)
    assert (config.load, config.block_l, config.num_warps) == ("tma", 32, 1)
    assert choose("sm_90", **{**call, "N": 128}).num_warps == 4


def test_rows_of_unequal_lengths_are_many_once_most_of_them_wait_for_others():
    call = {"n_spans": 1, "max_len": 512}
    assert choose("sm_90", N=31 * 132, **call).num_warps == 4
    assert choose("sm_90", N=32 * 132, **call).num_warps == 1


@pytest.mark.parametrize(("N", "n_spans", "max_len"), [(32, 44, 6432), (66, 38, 4807), (188, 10, 1867), (500, 12, 772)])
def test_several_spans_of_unequal_rows_are_gathered(N, n_spans, max_len):
    """The longest row's spans would fill tiles; those of most rows do not."""
    call = {"N": N, "D": 80, "Dv": 80, "n_spans": n_spans, "max_len": max_len}
    assert choose("sm_90", **call).load == "gather"
    assert choose("sm_90", **call, one_length=True).load == "tma"
    assert choose("sm_90", **{**call, "max_len": 256 * n_spans}).load == "tma"


def test_few_blocks_of_few_columns_are_gathered():
    call = {"N": 6656, "n_spans": 6, "max_len": 384, "shared_kv": True}
    assert [choose("sm_90", **call, D=D, Dv=D).load for D in (16, 48, 64)] == ["gather", "gather", "tma"]


def test_rows_in_large_tiles_have_them_as_long_as_their_parts():
    one = {"n_spans": 1, "one_length": True}
    for N, max_len, block_l, stages in ((4, 256, 256, 2), (32, 512, 128, 2), (32, 1024, 256, 2), (4, 512, 128, 3)):
        config = choose("sm_90", N=N, max_len=max_len, **one, D=64)
        assert (config.load, config.block_l, config.num_stages) == ("tma", block_l, stages), (N, max_len)


def test_rows_for_every_sm_have_two_warps_only_where_these_hold_the_result():
    one = {"N": 248, "n_spans": 1, "max_len": 930, "one_length": True}
    assert [choose("sm_90", **one, H=H, D=D, Dv=D).num_warps for H, D in ((16, 128), (32, 128), (16, 224))] == [2, 4, 4]


def test_rows_of_one_tile_have_launches_of_the_matrix():
    some = choose("sm_90", N=64, max_len=32)
    assert (some.load, some.block_l, some.num_stages) == ("gather", 32, 2)
    one = choose("sm_90", N=256, n_spans=1, max_len=64, one_length=True)
    assert (one.load, one.block_l, one.num_warps) == ("tma", 64, 2)


def test_long_parts_keep_three_stages():
    one = {"N": 24, "H": 3, "D": 160, "Dv": 64, "n_spans": 1, "one_length": True}
    assert [choose("sm_90", **one, max_len=length).num_stages for length in (1000, 4657)] == [2, 3]


def test_more_than_32_heads_have_tiles_of_32_where_these_fit_the_row_or_the_registers():
    def tiles(**change):
        return choose("sm_90", H=52, n_spans=4, **change).block_l

    assert [tiles(N=100, max_len=length) for length in (32, 48, 100, 200)] == [32, 64, 32, 64]
    assert [tiles(N=7336, max_len=407, D=D, Dv=D) for D in (96, 128)] == [64, 32]


def test_a_program_is_one_warp_only_where_its_threads_hold_result_and_q():
    assert [choose("sm_90", N=2000, H=32, D=D, Dv=D).num_warps for D in (128, 160)] == [1, 2]
    assert [choose("sm_90", N=2000, H=64, D=D, Dv=D).num_warps for D in (32, 64)] == [1, 4]
    assert [choose("sm_90", N=N, H=64, D=16, Dv=16).num_warps for N in (656, 5000)] == [4, 1]


def test_ranges_of_parts_meet():
    """More rows or shorter ones never lead to more parts."""
    for n_spans, max_len in itertools.product((1, 4, 64), (256, 1024, 4096, 65536)):
        parts = [choose("sm_90", N=N, n_spans=n_spans, max_len=max_len, one_length=True).splits for N in range(1, 300)]
        assert parts == sorted(parts, reverse=True), (n_spans, max_len)
