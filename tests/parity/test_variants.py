"""Every way to launch the kernel, forced one by one: loads, tiles, split rows, column chunks, warps and stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_sel.kernel.launch_config import LOADS, LaunchConfig, chunk_width

from .launches import covering, small_covering
from .parity_case import Case, check, has_clusters, has_tma, here, rows, run_kernel, tensors

# Spans longer than the largest tile, remainders of every kind, an empty row, one token, doubly covered keys.
RANGES = rows(
    [(0, 300)],
    [(3, 131), (131, 140), (200, 201), (0, 0), (150, 182)],
    [(0, 0), (9, 2)],
    [(128, 256), (100, 260), (0, 1), (128, 256)],
    [(299, 300)],
)
S_KV = 300
pytestmark = pytest.mark.costs(4)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("dtype", "H", "D", "Dv", "tiles", "splits", "every_warp"),
    [
        (torch.bfloat16, 4, 64, 64, (16, 32, 64, 128), here((1, 2, 8, 32), (1, 2, 16)), True),
        (torch.float16, 16, 192, 128, (16, 32), (1, 4), False),  # D in chunks
        (torch.float32, 6, 80, 48, (16,), (1, 4), False),  # padded heads and widths
    ],
    ids=("bf16", "fp16 in chunks", "fp32 padded"),
)
def test_triton_sel_parity_of_launch_variants(dtype, H, D, Dv, tiles, splits, every_warp, load):
    if load == "tma" and not has_tma():
        pytest.skip("TMA descriptors need Triton 3.4 and compute capability 9.0")
    for config in covering(H, D, Dv, tiles, splits, every_warp):
        if config.load == load:
            check(Case(RANGES, S_KV, H=H, D=D, Dv=Dv, dtype=dtype, launch=config))


@pytest.mark.parametrize(("block_d", "block_dv"), ((16, 64), (64, 16), (32, 32)))
def test_triton_sel_parity_of_column_chunks(block_d, block_dv):
    for load in {config.load for config in small_covering()}:
        config = next(c for c in small_covering() if c.load == load and c.splits > 1)
        check(Case(RANGES, S_KV, launch=replace(config, block_d=block_d, block_dv=block_dv)))


@pytest.mark.skipif(not has_clusters(), reason="needs thread-block clusters: Triton 3.6 to 3.9, capability 9 or 10")
@pytest.mark.parametrize("load", ("gather", "tma"))
@pytest.mark.parametrize(("splits", "cluster"), ((2, 2), (4, 4), (8, 8), (8, 2), (16, 8), (64, 2), (64, 8)))
def test_triton_sel_parity_of_clusters(splits, cluster, load):
    for H, D, Dv, dtype in (
        (4, 64, 64, torch.bfloat16),
        (16, 192, 128, torch.float16),
        (1, 128, 80, torch.bfloat16),
        (64, 64, 256, torch.float16),
        (6, 32, 192, torch.bfloat16),
    ):
        block_d, block_dv = chunk_width(D), chunk_width(Dv)
        config = LaunchConfig(load, 32, block_d, block_dv, 4, 2, splits, cluster=cluster)
        check(Case(RANGES, S_KV, H=H, D=D, Dv=Dv, dtype=dtype, launch=config))
        case = Case(RANGES.expand(2, -1, 3, -1, -1), S_KV, H=H, D=D, Dv=Dv, dtype=dtype, launch=config)
        inputs = tensors(case)
        first = run_kernel(case, *inputs)
        assert all(torch.equal(first, run_kernel(case, *inputs)) for _ in range(20))  # the counters are zero again
        apart = replace(case, launch=replace(config, cluster=1))
        tolerance = 2**-7 if dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(first, run_kernel(apart, *inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("D", "Dv", "change"), ((80, 64, {"block_d": 16}), (64, 80, {"block_dv": 16})))
def test_more_column_chunks_than_the_kernel_holds_are_refused(D, Dv, change):
    config = replace(small_covering()[0], **change)
    with pytest.raises(ValueError, match="launch: value is .*expected at most 4 column chunks"):
        run_kernel(case := Case(RANGES, S_KV, D=D, Dv=Dv, launch=config), *tensors(case))


def test_parts_that_make_no_whole_clusters_are_refused():
    config = replace(small_covering()[0], splits=6, cluster=4)
    with pytest.raises(ValueError, match="launch: value is .*expected splits that are a multiple of cluster"):
        check(Case(RANGES, S_KV, launch=config))


@pytest.mark.skipif(has_clusters(), reason="clusters can be had here")
def test_clusters_are_refused_where_there_are_none():
    config = replace(small_covering()[0], splits=4, cluster=4)
    with pytest.raises(ValueError, match="launch: value is .*expected a launch without clusters"):
        check(Case(RANGES, S_KV, launch=config))
