"""The coverage index: which tiles of KV the queries of a tile select, who selects them, and whether wholly.

A *query tile* is TQ neighbouring query tokens of one (b, g); a *KV tile* is BLOCK_T tokens from a multiple of BLOCK_T
on. Each program makes the list of one query tile. Every query has a bit map of the KV tiles that it touches, 32 to a
word, made from its spans without a loop over tiles; the list is made from the bits by a prefix sum. So the cost per
query tile is n_spans · TQ · S_kv / (32 · BLOCK_T) for the maps and TQ · S_kv / BLOCK_T single bits for the list, and
there is no sort, no sync, and no limit on the spans.
Source: docs/kernel.md, "Shared tiles".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .tiles import load_spans

# What a partial tile costs in a query tile's walk, in whole tiles: its spans are read again and counted per token.
# A guess, not measured.
PARTIAL_COST = tl.constexpr(2.0)
COVER_TENSORS = [f"{name}_ptr" for name in ("ranges", "tiles", "who", "count")]
COVER_SIZES = ["S", "G", "S_kv", "n_spans", "capacity", "stride_rb", "stride_rs", "stride_rg", "stride_rn"]


@triton.jit
def bits_between(first, last, word):
    """Return those of a word's 32 tiles that lie in [first, last), tile 32 · word + i as bit i."""
    lo = first - word * 32
    hi = last - word * 32
    some = (lo < hi) & (lo < 32) & (hi > 0)
    lo = tl.minimum(tl.maximum(lo, 0), 31)
    hi = tl.minimum(tl.maximum(hi, 1), 32)
    one = tl.full(some.shape, 1, tl.int32)
    return tl.where(some, (one << (hi - 1) << 1) - (one << lo), 0)


@triton.jit(do_not_specialize=COVER_SIZES)
def _cover(
    ranges_ptr, tiles_ptr, who_ptr, count_ptr,
    S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, capacity: tl.int32, break_even: tl.float32,
    stride_rb, stride_rs, stride_rg, stride_rn,
    TQ: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """List the KV tiles of query tile (b, s // TQ, g): program (b · query tiles + s // TQ, g).

    A query tile has `capacity` places in tiles_ptr (numbers of KV tiles) and who_ptr (bit q: query q selects from it).
    Its *whole* tiles, of which every query that selects from it selects each token once, stand in order from the first
    place on; its *partial* tiles, any others, in order from the last place back. count_ptr[2 · query tile]: how many
    whole ones, or -1 where the queries share too little, `break_even` visits per tile, or the list is longer than its
    places; and how many partial ones.
    """
    query_tiles = tl.cdiv(S, TQ)
    first_query = (query_tiles - 1 - tl.program_id(0) % query_tiles) * TQ  # causal rows grow: the longest first
    b = (tl.program_id(0) // query_tiles).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    query_tile = (b * query_tiles + first_query // TQ) * G + g
    offs_q = tl.arange(0, TQ)
    s = (first_query + offs_q).to(tl.int64)
    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
    n_whole = 0
    n_partial = 0
    n_visits = 0
    for first_word in range(0, tl.cdiv(S_kv, 32 * BLOCK_T), WORDS):
        word = first_word + tl.arange(0, WORDS)[None, :]
        touched = tl.zeros([TQ, WORDS], tl.int32)
        twice = touched
        covered = touched
        for first_span in range(0, n_spans, UNROLL):
            for i in tl.static_range(UNROLL):  # loads that do not depend on one another are in flight together
                n = tl.where(s < S, first_span + i, n_spans)
                start, end = load_spans(row_ptr, stride_rn.to(tl.int64), n, n_spans, S_kv, False)
                after = tl.where(end > start, tl.cdiv(end, BLOCK_T), 0)
                touches = bits_between((start // BLOCK_T)[:, None], after[:, None], word)
                twice |= touched & touches
                touched |= touches
                covered |= bits_between(tl.cdiv(start, BLOCK_T)[:, None], (end // BLOCK_T)[:, None], word)
        partly = touched & (twice | ~covered)
        bit = tl.arange(0, 32)[None, None, :]
        selects = (touched[:, :, None] >> bit) & 1
        visits = tl.reshape(tl.sum(selects, 0), [WORDS * 32])
        partials = tl.reshape(tl.sum((partly[:, :, None] >> bit) & 1, 0), [WORDS * 32])
        if TQ > 32:
            selects = selects.to(tl.int64)
        who = tl.reshape(tl.sum(selects << offs_q[:, None, None], 0), [WORDS * 32])
        is_partial = partials > 0
        is_whole = (visits > 0) & (partials == 0)
        whole_at = n_whole + tl.cumsum(is_whole.to(tl.int32), 0) - 1
        partial_at = capacity - n_partial - tl.cumsum(is_partial.to(tl.int32), 0)
        at = tl.where(is_partial, partial_at, whole_at)
        kept = (visits > 0) & (at >= 0) & (at < capacity)
        number = first_word * 32 + tl.arange(0, WORDS * 32)
        tl.store(tiles_ptr + query_tile * capacity + at, number, mask=kept)
        tl.store(who_ptr + query_tile * capacity + at, who, mask=kept)
        n_whole += tl.sum(is_whole.to(tl.int32), 0)
        n_partial += tl.sum(is_partial.to(tl.int32), 0)
        n_visits += tl.sum(visits, 0)
    cost = PARTIAL_COST * n_partial + n_whole
    shared = (n_visits >= break_even * cost) & (n_whole + n_partial <= capacity)
    tl.store(count_ptr + 2 * query_tile, tl.where(shared, n_whole, -1))
    tl.store(count_ptr + 2 * query_tile + 1, n_partial)
