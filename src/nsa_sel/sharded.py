"""The operation on DTensors: each process runs it on its own shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(*tensors: Any) -> bool:
    """Tell whether one of them is a DTensor of torch 2.5 or newer, without importing torch.distributed."""
    return any(f"{type(x).__module__}.{type(x).__name__}" == "torch.distributed.tensor.DTensor" for x in tensors)


def run_on_shards(call: Callable[..., Any], q: Any, k: Any, v: Any, ranges: Any) -> Any:
    """Run call(q, k, v, ranges) on the local shards, and present what it returns as DTensors.

    q decides: sharded over B or G, K, V and ranges are likewise; over S or H, K and V are whole, over H the ranges too.
    What is placed otherwise is redistributed. Differentiable.

    Raises: TypeError for an argument that is no DTensor; ValueError for one on another device mesh.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = next(x.device_mesh for x in (q, k, v, ranges) if isinstance(x, DTensor))
    for name, x in (("q", q), ("k", k), ("v", v), ("ranges", ranges)):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name}: type is {type(x).__name__}, expected DTensor as the others")
        if x.device_mesh != mesh:
            raise ValueError(f"{name}: device mesh is {x.device_mesh}, expected {mesh} as the others")
    whole = Replicate()
    placed: dict[int | None, tuple[Any, ...]] = {  # by the sharded dimension of q: q, K and V, their gradients, ranges
        0: (Shard(0), Shard(0), Shard(0), Shard(0)),
        1: (Shard(1), whole, Partial(), Shard(1)),
        2: (Shard(2), Shard(1), Shard(1), Shard(2)),
        3: (Shard(3), whole, Partial(), whole),
    }
    dims = [place.dim if type(place) is Shard else None for place in q.placements]
    of_q, of_kv, of_grad, of_ranges = zip(*(placed.get(dim, (whole, whole, whole, whole)) for dim in dims), strict=True)

    def local(x: Any, places: tuple, grads: tuple) -> Tensor:
        return x.redistribute(mesh, places).to_local(grad_placements=grads)

    def global_of(x: Tensor) -> Any:
        shape = torch.Size((*q.shape[:4], *x.shape[4:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, mesh, of_q, run_check=False, shape=shape, stride=stride)

    k_local, v_local = (local(x, of_kv, of_grad) for x in (k, v))
    result = call(local(q, of_q, of_q), k_local, v_local, local(ranges, of_ranges, of_ranges))
    return tuple(global_of(x) for x in result) if isinstance(result, tuple) else global_of(result)
