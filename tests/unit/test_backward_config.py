"""The launches of a backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nsa_sel.bench.checks.variants import ARCHITECTURES, SHARED_SAMPLE
from nsa_sel.kernel.backward_config import choose, dq_shared_bytes, fits, shared_default
from nsa_sel.kernel.call import Call

H200 = ARCHITECTURES[90][1]


@pytest.mark.parametrize("H", (4, 16))
def test_the_launch_on_an_h200_is_the_one_that_its_sweep_found(H):
    launch = choose(Call(65_536, H, 128, 128, 16, 1024, shared_kv=True), H200)
    assert str(launch) == "backward tma BL64 BD128 BDV128 w1 s2 split1, keys BT64 R32 w4 s4 x2112"
    assert launch.problem(H) is None


@pytest.mark.parametrize(("D", "block_t"), [(128, 64), (192, 32)])
def test_wide_rows_that_share_have_short_tiles(D, block_t):
    call = Call(65_536, 16, D, 128, 16, 1024, shared_kv=True)
    launch = shared_default(call, H200, choose(call, H200).row)
    assert (launch.rows, launch.block_t, launch.num_warps, launch.num_stages, launch.tma) == (64, block_t, 4, 2, True)


@pytest.mark.parametrize("gpu", [gpu for pair in ARCHITECTURES.values() for gpu in pair], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("element_bytes", (2, 4))
def test_rows_that_share_fit_into_shared_memory(gpu, element_bytes):
    for shape in SHARED_SAMPLE:
        call = replace(shape, element_bytes=element_bytes)
        if not fits(call, gpu):
            continue
        launch = shared_default(call, gpu, choose(call, gpu).row)
        assert dq_shared_bytes(launch, call) <= gpu.shared_bytes, launch
        assert launch.problem(call.H, call.D, call.Dv) is None
