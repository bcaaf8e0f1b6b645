"""The index of the backward pass: which rows select from each KV tile, and how tiles are cut into jobs.

A *KV tile* is BLOCK_T tokens from a multiple of BLOCK_T on; idx = (b·G + g)·tiles + tile numbers those of all groups.
`_mark` writes bit maps, a bit per query and tile; `_count` counts them per tile; `_share_out` gives every tile a place
in one list and cuts the tiles that many rows select into chunks; `_list` writes the list. Nothing is read back, there
is no sort, and no limit on the spans. The order of a tile's rows follows from the call alone: *whole* visits first (one
span holds every token of the tile, and no other touches it), then *plain* ones (one span holds some of its tokens, no
other touches it, and q, dO and δ of the row are finite), then all others, each kind by query.
Source: docs/kernel.md, "Backward pass".
"""

# No `from __future__ import annotations` here: Triton 3.0 and 3.1 read the annotations as objects.
import triton
import triton.language as tl

from .coverage import bits_between, count_bits
from .tiles import load_spans

KINDS = tl.constexpr(3)
MARK_SIZES = ["S", "G", "S_kv", "n_spans", "stride_rb", "stride_rs", "stride_rg", "stride_rn"]


@triton.jit(do_not_specialize=MARK_SIZES)
def _mark(
    ranges_ptr, finite_ptr, marks_ptr,
    S: tl.int32, G: tl.int32, S_kv: tl.int32, n_spans: tl.int32, stride_rb, stride_rs, stride_rg, stride_rn,
    PLAIN: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mark what 32 queries of (b, g) select: program (b · words + word, g), where words = ⌈S / 32⌉.

    marks_ptr int32 [B·G, 3, tiles, words]: bit q of a word is query 32 · word + q; whole visits, plain ones, others.
    finite_ptr: as `_sel_bwd_rows` writes it. PLAIN: there may be plain visits.
    """
    words = tl.cdiv(S, 32)
    tiles = tl.cdiv(S_kv, BLOCK_T)
    w = tl.program_id(0) % words
    b = (tl.program_id(0) // words).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    offs_q = tl.arange(0, 32)
    s = (w * 32 + offs_q).to(tl.int64)
    row_ptr = ranges_ptr + b * stride_rb + s * stride_rs + g * stride_rg
    whole_ptr = marks_ptr + (b * G + g) * KINDS * tiles * words + w
    plain_ptr = whole_ptr + tiles.to(tl.int64) * words
    other_ptr = plain_ptr + tiles.to(tl.int64) * words
    odd = tl.full([32], -1, tl.int32)
    if PLAIN:
        odd = tl.where(tl.load(finite_ptr + (b * S + s) * G + g, mask=s < S, other=0.0) == 0.0, 0, -1)
    bit = tl.arange(0, 32)[None, None, :]
    for first_word in range(0, tl.cdiv(tiles, 32), WORDS):
        word = first_word + tl.arange(0, WORDS)[None, :]
        touched = tl.zeros([32, WORDS], tl.int32)
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
                full = tl.where(end == S_kv, after, end // BLOCK_T)  # the last tile ends where the context does
                covered |= bits_between(tl.cdiv(start, BLOCK_T)[:, None], full[:, None], word)
        partly = touched & (twice | ~covered)
        other = partly & (twice | odd[:, None])
        plain = partly & ~other
        whole = tl.sum((((touched & ~partly)[:, :, None] >> bit) & 1) << offs_q[:, None, None], 0)
        plain = tl.sum(((plain[:, :, None] >> bit) & 1) << offs_q[:, None, None], 0)
        other = tl.sum(((other[:, :, None] >> bit) & 1) << offs_q[:, None, None], 0)
        tile = first_word * 32 + tl.arange(0, WORDS * 32)
        at = tile.to(tl.int64) * words
        tl.store(whole_ptr + at, tl.reshape(whole, [WORDS * 32]), mask=tile < tiles)
        tl.store(plain_ptr + at, tl.reshape(plain, [WORDS * 32]), mask=tile < tiles)
        tl.store(other_ptr + at, tl.reshape(other, [WORDS * 32]), mask=tile < tiles)


@triton.jit(do_not_specialize=["tiles", "words"])
def _count(marks_ptr, count_ptr, tiles: tl.int32, words: tl.int32, BLOCK_W: tl.constexpr):
    """Count a tile's visits: program (idx, kind), count_ptr [idx, kind]; kinds: whole, plain, other."""
    idx = tl.program_id(0).to(tl.int64)
    at = ((idx // tiles * KINDS + tl.program_id(1)) * tiles + idx % tiles) * words
    total = tl.zeros([BLOCK_W], tl.int32)
    for first in range(0, words, BLOCK_W):
        offs_w = first + tl.arange(0, BLOCK_W)
        total += count_bits(tl.load(marks_ptr + at + offs_w, mask=offs_w < words, other=0))
    tl.store(count_ptr + idx * KINDS + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def load_visits(count_ptr, idx, there):
    """Load how many visits of all kinds tiles have; 0 where they are not `there`."""
    visits = tl.load(count_ptr + KINDS * idx, mask=there, other=0)
    for kind in tl.static_range(1, KINDS):
        visits += tl.load(count_ptr + KINDS * idx + kind, mask=there, other=0)
    return visits


@triton.jit(do_not_specialize=["n", "slots", "least"])
def _share_out(
    count_ptr, first_ptr, chunks_ptr, slot_ptr, n_slots_ptr, n: tl.int32, slots: tl.int32, least: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Give each of n tiles its place in the list, and cut the tiles of many visits: one program.

    A chunk has `least` visits or more, and so many that all chunks together need no more than `slots` places for their
    sums. first_ptr int64: where the tile's rows begin in the list. chunks_ptr: how many jobs the tile is; if more than
    one, slot_ptr is the first one's place. n_slots_ptr[0]: places that are used.
    """
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.int64)
    for at in range(0, n, BLOCK):
        there = at + offs < n
        total += tl.sum(load_visits(count_ptr, at + offs, there).to(tl.int64), 0)
    chunk = tl.maximum(tl.cdiv(total, slots), least).to(tl.int32)
    before = tl.zeros([], tl.int64)
    used = tl.zeros([], tl.int32)
    for at in range(0, n, BLOCK):
        there = at + offs < n
        visits = load_visits(count_ptr, at + offs, there)
        upto = tl.cumsum(visits.to(tl.int64), 0)
        tl.store(first_ptr + at + offs, before + upto - visits, mask=there)
        chunks = tl.maximum(visits // chunk, 1)  # between one and two times `chunk` visits each
        own = tl.where(chunks > 1, chunks, 0)
        slot = tl.cumsum(own, 0)
        tl.store(chunks_ptr + at + offs, chunks, mask=there)
        tl.store(slot_ptr + at + offs, used + slot - own, mask=there)
        before += tl.sum(visits.to(tl.int64), 0)
        used += tl.sum(own, 0)
    tl.store(n_slots_ptr, used)


@triton.jit(do_not_specialize=["tiles", "words", "capacity"])
def _list(
    marks_ptr, count_ptr, first_ptr, chunks_ptr, slot_ptr, rows_ptr, jobs_ptr,
    tiles: tl.int32, words: tl.int32, capacity: tl.int64, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write a tile's rows, as queries, into rows_ptr, and idx into jobs_ptr once per chunk: program idx.

    capacity: places in rows_ptr. There are enough unless max_len was too small: what is beyond is left out.
    """
    idx = tl.program_id(0).to(tl.int64)
    place = tl.load(first_ptr + idx)
    offs_w = tl.arange(0, BLOCK_W)
    bit = tl.arange(0, 32)[None, :]
    for kind in tl.static_range(KINDS):
        at = ((idx // tiles * KINDS + kind) * tiles + idx % tiles) * words
        for first in range(0, words, BLOCK_W):
            word = tl.load(marks_ptr + at + first + offs_w, mask=first + offs_w < words, other=0)
            marked = tl.reshape((word[:, None] >> bit) & 1, [BLOCK_W * 32])
            where = place + tl.cumsum(marked, 0) - 1
            query = first * 32 + tl.arange(0, BLOCK_W * 32)
            tl.store(rows_ptr + where, query, mask=(marked != 0) & (where < capacity))
            place += tl.sum(marked, 0)
    chunks = tl.load(chunks_ptr + idx)
    if chunks > 1:
        slot = tl.load(slot_ptr + idx)
        for first in range(0, chunks, 32):
            offs = first + tl.arange(0, 32)
            tl.store(jobs_ptr + slot + offs, tl.zeros([32], tl.int32) + idx.to(tl.int32), mask=offs < chunks)
