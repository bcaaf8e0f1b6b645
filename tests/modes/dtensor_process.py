"""One of the processes that run the operation on DTensors and compare with one device.

python FILE DEVICE RANK PROCESSES STORE BACKEND... with "cpu", on which Triton interprets, or "cuda" as DEVICE.
"""

from __future__ import annotations

import os
import sys

if sys.argv[1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from mode_case import HINTS, inputs, plain
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor

from nsa_sel import selection_attention

WHOLE = Replicate()
PLACES = [  # of q, of K and V, of ranges
    (Shard(0), Shard(0), Shard(0)),
    (Shard(2), Shard(1), Shard(2)),
    (Shard(1), WHOLE, Shard(1)),
    (Shard(3), WHOLE, WHOLE),
    (WHOLE, WHOLE, WHOLE),
    (Shard(0), WHOLE, WHOLE),  # redistributed
    (Shard(4), Shard(2), Shard(3)),
]


def main(device: str, rank: int, processes: int, store: str, backends: list[str]) -> None:
    group = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(group, init_method=f"file://{store}", rank=rank, world_size=processes)
    mesh = DeviceMesh(device, list(range(processes)))
    q, k, v, ranges = inputs()
    for of_q, of_kv, of_ranges in PLACES:
        for backend in backends:
            for hints in HINTS:
                places = (of_q, of_kv, of_kv, of_ranges)
                args = [distribute_tensor(x, mesh, [p]) for x, p in zip((q, k, v, ranges), places, strict=True)]
                want, want_lse = selection_attention(q, k, v, ranges, backend=backend, return_lse=True, **hints)
                out, lse = selection_attention(*args, backend=backend, return_lse=True, **hints)
                assert isinstance(out, DTensor) and out.shape == want.shape
                torch.testing.assert_close(out.full_tensor(), want)
                torch.testing.assert_close(lse.full_tensor(), want_lse)
                if of_q in (Shard(0), Shard(1), Shard(2), Shard(3)):
                    assert out.placements == (of_q,)
                if backend == "triton":
                    continue
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                exact = torch.autograd.grad(plain(*leaves, ranges).sin().sum(), leaves)
                for x in args[:3]:
                    x.requires_grad_()
                selection_attention(*args, backend=backend, **hints).sin().sum().backward()
                for x, gradient in zip(args, exact, strict=False):
                    torch.testing.assert_close(x.grad.full_tensor(), gradient, atol=1e-5, rtol=0)

    sharded = [distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v, ranges)]
    try:
        selection_attention(*sharded[:3], ranges)
    except TypeError as error:
        assert str(error).startswith("ranges: type is Tensor, expected DTensor"), error
    else:
        raise AssertionError("a tensor among DTensors was taken")
    parts = DTensor.from_local(q / processes, mesh, [Partial()])
    whole = [distribute_tensor(x, mesh, [WHOLE]) for x in (k, v, ranges)]
    torch.testing.assert_close(selection_attention(parts, *whole).full_tensor(), plain(q, k, v, ranges))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
