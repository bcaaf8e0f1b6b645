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

# What a partial tile costs in a query tile's walk, in whole tiles: it has masks, and if a query has two spans there,
# its spans are read again and counted per token. On an H200 5.9 ns in place of 3.8. The first one counts for one: in a
# causal prefill every query tile has one, its own, and so have the rows.
PARTIAL_COST = tl.constexpr(1.5)
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


@triton.jit
def either(x, y):
    """Return the bits of two words."""
    return x | y


@triton.jit
def once_and_twice(once_x, twice_x, once_y, twice_y):
    """Add up bits that are in some of several words, and in more than one."""
    return once_x | once_y, twice_x | twice_y | once_x & once_y


@triton.jit
def count_bits(words):
    """Count the bits of each 32-bit word."""
    x = words.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return ((x + (x >> 16)) & 63).to(tl.int32)


@triton.jit
def shares(half_visits, n_whole, n_partial, capacity, break_even):
    """Tell whether a query tile with so many visits, in halves, to so many KV tiles is to share them.

    A partial visit is half of one: a row on its own reads, of a tile that it selects in part, half on average.
    """
    cost = n_whole + PARTIAL_COST * n_partial - (PARTIAL_COST - 1.0) * tl.minimum(n_partial, 1)
    return (0.5 * half_visits >= break_even * cost) & (n_whole + n_partial <= capacity)


@triton.jit(do_not_specialize=COVER_SIZES)
def _cover(
    ranges_ptr, tiles_ptr, who_ptr, count_ptr,
    S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, capacity: tl.int32, break_even: tl.float32,
    stride_rb, stride_rs, stride_rg, stride_rn,
    TQ: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr, SPANS: tl.constexpr,
    UNROLL: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """List the KV tiles of query tile (b, s // TQ, g): program (b · query tiles + s // TQ, g).

    A query tile has `capacity` places in tiles_ptr (numbers of KV tiles) and who_ptr (bit q: query q selects from it).
    Its *whole* tiles, of which every query that selects from it selects each token once, stand in order from the first
    place on; its *partial* tiles, any others, in order from the last place back. count_ptr[2 · query tile]: how many
    whole ones, or -1 where the queries share too little, `break_even` visits per tile, or the list is longer than its
    places; and how many partial ones. ONCE: all KV tiles fit in WORDS words; then only lists that are read are made.
    SPANS: spans of a query that are taken at once, by threads that would have nothing to do for so few words.
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
    half_visits = 0
    for first_word in range(0, tl.cdiv(S_kv, 32 * BLOCK_T), WORDS):
        word = first_word + tl.arange(0, WORDS)[None, None, :]
        touched = tl.zeros([TQ, SPANS, WORDS], tl.int32)
        twice = touched
        covered = touched
        for first_span in range(0, n_spans, UNROLL * SPANS):
            for i in tl.static_range(UNROLL):  # loads that do not depend on one another are in flight together
                n = first_span + i * SPANS + tl.arange(0, SPANS)[None, :]
                n = tl.where((s < S)[:, None], n, n_spans)
                start, end = load_spans(row_ptr[:, None], stride_rn.to(tl.int64), n, n_spans, S_kv, False)
                after = tl.where(end > start, tl.cdiv(end, BLOCK_T), 0)
                touches = bits_between((start // BLOCK_T)[:, :, None], after[:, :, None], word)
                twice |= touched & touches
                touched |= touches
                first_whole, after_whole = tl.cdiv(start, BLOCK_T), end // BLOCK_T
                covered |= bits_between(first_whole[:, :, None], after_whole[:, :, None], word)
        touched, twice = tl.reduce((touched, twice), 1, once_and_twice)
        partly = touched & (twice | ~tl.reduce(covered, 1, either))
        by_any = tl.reduce(touched, 0, either)
        partly_by_any = tl.reduce(partly, 0, either)
        more_partial = tl.sum(count_bits(partly_by_any), 0)
        more_whole = tl.sum(count_bits(by_any), 0) - more_partial
        half_visits += tl.sum(tl.sum(count_bits(touched) + count_bits(touched & ~partly), 0), 0)
        wanted = True
        if ONCE:  # all is known before the list is made
            wanted = shares(half_visits, more_whole, more_partial, capacity, break_even)
        if wanted:
            bit = tl.arange(0, 32)
            is_partial = tl.reshape((partly_by_any[:, None] >> bit[None, :]) & 1, [WORDS * 32])
            is_listed = tl.reshape((by_any[:, None] >> bit[None, :]) & 1, [WORDS * 32])
            selects = (touched[:, :, None] >> bit[None, None, :]) & 1
            if TQ > 32:
                selects = selects.to(tl.int64)
            who = tl.reshape(tl.sum(selects << offs_q[:, None, None], 0), [WORDS * 32])
            before = tl.cumsum(is_listed + 65535 * is_partial, 0)  # partial ones in the upper 16 bits, whole ones below
            whole_at = n_whole + (before & 65535) - 1
            partial_at = capacity - n_partial - (before >> 16)
            at = tl.where(is_partial != 0, partial_at, whole_at)
            kept = (is_listed != 0) & (at >= 0) & (at < capacity)
            number = first_word * 32 + tl.arange(0, WORDS * 32)
            tl.store(tiles_ptr + query_tile * capacity + at, number, mask=kept)
            tl.store(who_ptr + query_tile * capacity + at, who, mask=kept)
        n_whole += more_whole
        n_partial += more_partial
    shared = shares(half_visits, n_whole, n_partial, capacity, break_even)
    tl.store(count_ptr + 2 * query_tile, tl.where(shared, n_whole, -1))
    tl.store(count_ptr + 2 * query_tile + 1, n_partial)
