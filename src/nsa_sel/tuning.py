"""The launch decision: which variant, tile, split, warps and stages a call runs with. Pure Python, no GPU needed."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEADS = 64
MAX_WIDTH = 256
MAX_SPANS = 1024
MAX_CHUNKS = 4  # column chunks of D or Dv that the kernel can hold


@dataclass(frozen=True)
class LaunchConfig:
    """Name every compile-time choice of one launch.

    load: "gather" (every token has its own address), "whole" (tiles inside a span through pointers, the rest gathered) or
    "tma" (those tiles through TMA descriptors). block_l: tokens a tile; block_d, block_dv: columns a chunk of D and Dv.
    splits: programs a row.
    """

    load: str
    block_l: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def __str__(self) -> str:
        return (
            f"{self.load} BL{self.block_l} BD{self.block_d} BDV{self.block_dv} "
            f"w{self.num_warps} s{self.num_stages} split{self.splits}"
        )


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


def chunk_width(width: int) -> int:
    """Return the power of two that covers D or Dv in at most MAX_CHUNKS chunks with the least padding, the widest such."""
    candidates = [c for c in (256, 128, 64, 32, 16) if c * MAX_CHUNKS >= width and c < 2 * width]
    return min(candidates, key=lambda c: (-(-width // c) * c, -c))


def choose(N: int, H: int, D: int, Dv: int, n_spans: int, max_len: int, *, sm_count: int, has_tma: bool) -> LaunchConfig:
    """Choose the launch for N rows of at most max_len tokens on a GPU with sm_count multiprocessors."""
    splits = 1
    while N * splits * 2 <= sm_count and max_len >= 64 * splits and splits < 32:
        splits *= 2
    few = N * splits <= 2 * sm_count
    return LaunchConfig("gather", 32, chunk_width(D), chunk_width(Dv), 4 if few or H > 16 else 1, 3, splits)


def candidate_configs(H: int, D: int, Dv: int) -> list[LaunchConfig]:
    """List every launch that a sweep may try for these widths."""
    return [
        LaunchConfig(load, block_l, chunk_width(D), chunk_width(Dv), warps, stages, splits)
        for load in ("gather", "whole", "tma")
        for block_l in (16, 32, 64, 128)
        for warps in (1, 2, 4, 8)
        for stages in (1, 2, 3, 4)
        for splits in (1, 2, 4, 8, 16, 32)
    ]
