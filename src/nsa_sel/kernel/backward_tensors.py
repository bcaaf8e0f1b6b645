"""The tensors of a backward pass: what it takes, and what its kernels leave for one another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Saved(NamedTuple):
    """Hold what the backward pass takes: the inputs, the forward's results, and their gradients.

    out, dout: contiguous [B, S, G, H, Dv]; lse, dlse: contiguous fp32 [B, S, G, H]; dlse may be None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None


class OfRows(NamedTuple):
    """Hold what the rows' pass leaves for the keys' pass: `_sel_bwd_rows` says what."""

    stat: Tensor
    finite: Tensor


class RowIndex(NamedTuple):
    """Hold the rows by KV tile, as backward_index.py writes them; marks is room for `_mark`'s bits."""

    marks: Tensor
    counts: Tensor
    first: Tensor
    chunks: Tensor
    slot: Tensor
    n_slots: Tensor
    rows: Tensor
    jobs: Tensor
