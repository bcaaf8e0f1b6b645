"""The only place that says what a range means.

A span `[start, end)` selects the KV tokens start, …, end-1. It is clamped to `[0, S_kv]`; with `end <= start` it is
empty. A row is the concatenation of its spans in the order given: spans may touch, overlap and come in any order, and a
key that two spans cover counts twice, exactly as packing the row would make it.
Source: NSA (arXiv 2502.11089), section 3.3.2, token selection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes

# Of a paged cache, as servers name them, [pages, page_size, G, D] and [pages, G, page_size, D]: where G stands.
PAGE_LAYOUTS = {"NHD": 2, "HND": 1}
MAX_TOKENS = 2**31 - 1


def clamp(ranges: Tensor, S_kv: int) -> tuple[Tensor, Tensor]:
    """Return the spans' starts and ends inside the context, int64 [B, S, G, n_spans]: 0 <= start <= end <= S_kv."""
    bounds = ranges.clamp(0, min(S_kv, torch.iinfo(ranges.dtype).max)).long()
    starts = bounds[..., 0]
    return starts, torch.maximum(bounds[..., 1], starts)


def lengths(ranges: Tensor, S_kv: int) -> Tensor:
    """Return L of every row, int64 [B, S, G]."""
    starts, ends = clamp(ranges, S_kv)
    return (ends - starts).sum(-1)


def token_index(ranges: Tensor, S_kv: int, max_len: int, *, ragged: bool = True) -> tuple[Tensor, Tensor]:
    """Return each row's token positions, int64 [B, S, G, max_len], and which of them are real, bool of the same shape.

    The rest is padding: it repeats the row's last token, in an empty row some token of the context. `ragged=False`
    promises that every row has L = max_len and saves the work for the padding. Every index lies in [0, S_kv), whatever
    the ranges hold; S_kv must be at least 1. No device sync, no loop over rows or spans.
    """
    starts, ends = clamp(ranges, S_kv)
    place = torch.arange(max_len, device=ranges.device)
    shape = (*ranges.shape[:3], max_len)
    if ranges.shape[3] == 0:
        index = torch.zeros(shape, dtype=torch.int64, device=ranges.device)
        return index, torch.zeros_like(index, dtype=torch.bool)
    stops = (ends - starts).cumsum(-1)  # [B, S, G, n_spans]: where each span stops in the packed row
    L = stops[..., -1:]
    valid = place < L
    spot = torch.minimum(place, (L - 1).clamp(min=0)) if ragged else place.expand(shape)
    if ranges.shape[3] == 1:
        index = starts + spot
    else:
        # In the packed row span j sits at stops[j] - length, so token = place + ends[j] - stops[j].
        shift = ends - stops
        # searchsorted does not fuse, its code generation fails for small L, and torch.func has no rule for it.
        if torch.compiler.is_compiling() or modes.transformed():
            jump = torch.diff(shift, dim=-1)
            index = (
                spot
                + shift[..., :1]
                + torch.where(spot[..., None] >= stops[..., None, :-1], jump[..., None, :], 0).sum(-1)
            )
        else:
            # Two limits: of a maximum alone, if it is a size, torch.jit.trace makes a tensor, on the CPU.
            span = torch.searchsorted(stops, spot.contiguous(), right=True).clamp(0, ranges.shape[3] - 1)
            index = spot + shift.gather(-1, span)
    return index.clamp(0, S_kv - 1), valid


def validate(ranges: Tensor, S_kv: int, min_len: int | None = None, max_len: int | None = None) -> None:
    """Check that every span lies in the context and that the length hints hold. Costs one device sync.

    Raises:
        ValueError: names the first row `(b, s, g)` and span with an end outside `[0, S_kv]`, or the row whose L
            contradicts `min_len` or `max_len`.
    """
    bad_span = ((ranges < 0) | (ranges.long() > S_kv)).any(-1)
    L = lengths(ranges, S_kv)
    bad_low = torch.zeros_like(L, dtype=torch.bool) if min_len is None else L.lt(min_len)
    bad_high = torch.zeros_like(bad_low) if max_len is None else L.gt(max_len)
    if not (bad_span.any() | bad_low.any() | bad_high.any()).item():
        return
    if bad_span.any():
        b, s, g, n = bad_span.nonzero()[0].tolist()
        start, end = ranges[b, s, g, n].tolist()
        raise ValueError(
            f"ranges: value is [{start}, {end}) in row (b={b}, s={s}, g={g}), span {n}, "
            f"expected both ends in [0, {S_kv}]"
        )
    name, bad, bound, relation = "max_len", bad_high, max_len, "at least"
    if bad_low.any():
        name, bad, bound, relation = "min_len", bad_low, min_len, "at most"
    b, s, g = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{name}: value is {bound}, expected {relation} {int(L[b, s, g])}, the length of row (b={b}, s={s}, g={g})"
    )


def dense_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Present packed rows of one length as the operation's arguments: B = N, S = G = 1, one span (0, L) a row.

    q [N, H, D], k [N, L, D], v [N, L, Dv] → q [N, 1, 1, H, D], k [N, 1, L, D], v [N, 1, L, Dv], ranges int32. No copy.
    """
    N, L = k.shape[:2]
    ranges = torch.tensor([0, L], dtype=torch.int32, device=q.device).repeat(N, 1).view(N, 1, 1, 1, 2)
    return q[:, None, None], k[:, None], v[:, None], ranges


def varlen_rows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Present packed rows of different lengths as the operation's arguments: one sequence, S = N, one span a row.

    q [N, H, D], k [T, D], v [T, Dv], cu_seqlens int32 or int64 [N+1] → q [1, N, 1, H, D], k [1, 1, T, D],
    v [1, 1, T, Dv], ranges [1, N, 1, 1, 2] with span (cu_seqlens[i], cu_seqlens[i+1]) in row i.
    """
    ranges = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), dim=1).view(1, -1, 1, 1, 2)
    return q[None, :, None], k[None, None], v[None, None], ranges


def block_ranges(
    blocks: Tensor, block_size: int, context: int | Tensor, *, offset: int | Tensor = 0, unique: bool = False
) -> Tensor:
    """Turn selected block numbers into ranges clamped to the context: the decode and causal prefill layouts of NSA.

    blocks int [B, S, G, n_spans]: block b becomes [b·block_size, min((b+1)·block_size, context)); b < 0: an empty span.
    context: tokens that a row may see (t, or t+1 counting the query's own), an int or a tensor that broadcasts.
    offset: the token of one long K/V at which each row's own sequence begins, added to both ends; as context.
    unique: a block that a row names twice counts once, as in several other kernels; else twice, as packing makes it.
    Returns ranges int32 [B, S, G, n_spans, 2]. No device sync.
    """
    chosen = blocks >= 0
    if unique:
        chosen = chosen & ~_named_before(blocks)
    starts = blocks.long() * block_size
    ends = starts + block_size
    # A number stays one: a tensor made of it would be copied to the device, which a CUDA graph cannot capture.
    limit, first = (x if isinstance(x, int) else torch.as_tensor(x, device=blocks.device) for x in (context, offset))
    starts, ends = starts.clamp(max=limit) + first, ends.clamp(max=limit) + first
    return torch.stack((torch.where(chosen, starts, 0), torch.where(chosen, ends, 0)), dim=-1).int()


def paged_view(cache: Tensor, B: int, layout: str = "NHD") -> Tensor:
    """See a paged cache of K or V as the one long K or V that B sequences share: no copy.

    cache: "NHD" [pages, page_size, G, D] → [B, G, pages·page_size, D]; "HND" [pages, G, page_size, D] →
    [B, G, pages·G·page_size, D], the same for every group, whose pages `paged_ranges` finds. Its strides over B, and
    with "HND" over G, are 0. Take this view of K and of V, and ranges from `paged_ranges` with the same layout.

    Raises:
        ValueError: the rank, an unknown layout, pages that do not follow one another without a gap, or a cache of more
            than 2**31 - 1 tokens, which ranges cannot count.
    """
    _check_layout(layout)
    if cache.dim() != 4:
        raise ValueError(f"cache: rank is {cache.dim()}, expected 4")
    beside = 1 if layout == "HND" else cache.shape[2]  # groups of a token that lie beside each other
    n_tokens, G = cache.shape[:3].numel() // beside, cache.shape[PAGE_LAYOUTS[layout]]
    if n_tokens > MAX_TOKENS:
        raise ValueError(f"cache: shape is {tuple(cache.shape)}, expected at most {MAX_TOKENS} tokens")
    try:
        tokens = cache.view(n_tokens, beside, cache.shape[3])
    except RuntimeError:
        raise ValueError(f"cache: stride is {cache.stride()}, expected pages without a gap between them") from None
    return tokens.transpose(0, 1).expand(B, G, -1, -1)


def paged_ranges(
    blocks: Tensor,
    block_size: int,
    block_table: Tensor,
    page_size: int,
    context: int | Tensor,
    *,
    layout: str = "NHD",
    unique: bool = False,
) -> Tensor:
    """Turn selected block numbers into ranges over a paged cache, which `paged_view` shows as one long K and V.

    blocks, block_size, context, unique: as `block_ranges` takes them; blocks [B, S, G, n].
    block_table: int32 or int64 [B, n_pages]: page i of a sequence holds its tokens from i·page_size on, and lies in
    page block_table[b, i] of the cache; a negative number is no page. page_size: tokens per page, smaller, equal or
    larger than a block. layout: of the cache, as `paged_view` takes it.
    Returns ranges int32 [B, S, G, n·p, 2] with p = `pages_per_block`(block_size, page_size). Spans that touch, one
    behind the other, are joined into the first of them, and the others are empty. Tokens without a page are left out.
    The shape depends on shapes and sizes only: no device sync, and a CUDA graph may be replayed with other blocks,
    tables and contexts in the same tensors.

    Raises:
        ValueError, TypeError: an argument's rank, shape, dtype or value, named.
    """
    _check_layout(layout)
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table: dtype is {block_table.dtype}, expected torch.int32 or torch.int64")
    for name, size in (("block_size", block_size), ("page_size", page_size)):
        if size < 1:
            raise ValueError(f"{name}: value is {size}, expected at least 1")
    if blocks.dim() != 4:
        raise ValueError(f"blocks: rank is {blocks.dim()}, expected 4")
    B, _, G, n = blocks.shape
    if block_table.dim() != 2 or block_table.shape[0] != B or not block_table.shape[1]:
        raise ValueError(f"block_table: shape is {tuple(block_table.shape)}, expected ({B}, at least 1)")
    n_pages = block_table.shape[1]
    starts, ends = block_ranges(blocks, block_size, context, unique=unique).long()[..., None, :].unbind(-1)
    p = pages_per_block(block_size, page_size)
    page = starts // page_size + torch.arange(p, device=blocks.device)  # of the sequence: [B, S, G, n, p]
    place = block_table.long().gather(1, page.clamp(0, n_pages - 1).flatten(1)).view_as(page)  # in the cache
    starts = torch.maximum(starts, page * page_size)
    ends = torch.minimum(ends, (page + 1) * page_size)
    real = ((ends > starts) & (page < n_pages) & (place >= 0)).flatten(3)
    if layout == "HND":
        place = place * G + torch.arange(G, device=blocks.device).view(G, 1, 1)
    shift = (place - page) * page_size
    starts, ends = ((x + shift).flatten(3) for x in (starts, ends))
    joined = F.pad(real[..., 1:] & real[..., :-1] & (starts[..., 1:] == ends[..., :-1]), (1, 0))  # to the one before
    number = torch.arange(n * p, device=blocks.device)
    # The last span of a run is the first, from a span on, that none is joined to.
    goes_on = F.pad(joined[..., 1:], (0, 1))
    last = torch.where(goes_on, n * p, number).flip(-1).cummin(-1).values.flip(-1)
    first = (real & ~joined)[..., None]
    return torch.where(first, torch.stack((starts, ends.gather(-1, last)), -1), 0).int()


def pages_per_block(block_size: int, page_size: int) -> int:
    """Return the most pages that a block may touch, which is how many spans `paged_ranges` gives it.

    block_size / page_size where pages divide blocks, 1 where blocks divide pages.
    """
    last_start = page_size - math.gcd(block_size, page_size)  # of a block within a page
    return -(-(last_start + block_size) // page_size)


def _check_layout(layout: str) -> None:
    if layout not in PAGE_LAYOUTS:
        raise ValueError(f"layout: value is {layout!r}, expected one of {', '.join(PAGE_LAYOUTS)}")


def _named_before(blocks: Tensor) -> Tensor:
    """Tell of each block number whether its row names it already: bool of the same shape."""
    in_order, at = blocks.sort(dim=-1, stable=True)
    again = F.pad(in_order[..., 1:] == in_order[..., :-1], (1, 0))
    return torch.zeros_like(again).scatter(-1, at, again)


def ranges_to_blocks(ranges: Tensor, block_size: int, S_kv: int) -> Tensor:
    """Turn ranges into selected block numbers, the argument of kernels that take blocks: the inverse of `block_ranges`.

    Token s attends to the keys of its blocks up to position S_kv - S + s: its own where the S queries are the last
    tokens of the context. A span of several blocks becomes their numbers; a block that two spans cover stands twice.
    Returns int32 [B, S, G, n], n being the most blocks of a row, each row's in the order of its spans, then -1. Costs
    two device syncs.

    Raises:
        ValueError: names the first row `(b, s, g)` and span that is no run of whole blocks; only the token's own
            position may cut the last block short.
    """
    starts, ends = clamp(ranges, S_kv)
    S = ranges.shape[1]
    limit = torch.arange(S_kv - S + 1, S_kv + 1, device=ranges.device).view(1, S, 1, 1)  # of each token, exclusive
    whole = (ends % block_size == 0) & (ends <= limit)
    bad = (ends > starts) & ((starts % block_size != 0) | ~(whole | (ends == limit)))
    if bad.any():
        b, s, g, n = bad.nonzero()[0].tolist()
        raise ValueError(
            f"ranges: value is [{int(starts[b, s, g, n])}, {int(ends[b, s, g, n])}) in row (b={b}, s={s}, g={g}), "
            f"span {n}, expected whole blocks of {block_size} tokens, the last cut short only at {S_kv - S + s + 1}"
        )
    n_blocks = -(-S_kv // block_size)
    in_blocks = torch.stack((starts // block_size, -(-ends // block_size)), -1)
    in_blocks = torch.where((ends > starts)[..., None], in_blocks, 0)
    most = int(lengths(in_blocks, n_blocks).amax()) if in_blocks.numel() else 0
    index, valid = token_index(in_blocks, max(n_blocks, 1), most)
    return torch.where(valid, index, -1).int()
