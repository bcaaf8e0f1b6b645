"""The compile-time choices of one launch, and what follows from them: widths, shared memory, workspace."""

from __future__ import annotations

from dataclasses import dataclass, replace

LOADS = ("gather", "whole", "tma")
MAX_HEADS = 64
MAX_WIDTH = 256  # of D and Dv
SPAN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 1024)  # spans per row that kernels are compiled for: few sizes, few kernels
MAX_SPANS = SPAN_BUCKETS[-1]
MAX_GROUPS = 65535  # CUDA's limit on the second grid dimension
MAX_CHUNKS = 4  # column chunks of D or Dv that the kernel can hold
SMALLEST_SHARED_BYTES = 101_376  # what a program may use on sm_86, 89 and 120
MERGE_UNROLL = 8  # parts that the merge loads together
MERGE_REGISTERS = 128  # of each thread, that hold them


@dataclass(frozen=True)
class LaunchConfig:
    """Name every compile-time choice of one launch.

    load: "gather" (every token has its own address), "whole" (tiles inside a span through pointers) or "tma" (those
    tiles through TMA descriptors). block_l: tokens per tile. block_d, block_dv: columns per chunk of D and Dv. splits:
    programs per row. max_registers: the limit of each thread, 0 for none. cluster: programs of a row that merge as a
    thread-block cluster; it divides splits. With 1 the program that arrives last merges all.
    Source: docs/kernel.md.
    """

    load: str
    block_l: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_registers: int = 0
    cluster: int = 1

    def __str__(self) -> str:
        more = f" r{self.max_registers}" if self.max_registers else ""
        more += f" cluster{self.cluster}" if self.cluster > 1 else ""
        return (
            f"{self.load} BL{self.block_l} BD{self.block_d} BDV{self.block_dv} "
            f"w{self.num_warps} s{self.num_stages} split{self.splits}{more}"
        )

    def with_fewest_parts(self) -> LaunchConfig:
        """Return the launch of fewest parts that runs the same kernel: their number is a run-time argument."""
        return replace(self, splits=min(self.splits, max(2, self.cluster)))

    def part_floats(self, H: int, Dv: int) -> int:
        """Return how many fp32 values each part of a row leaves in the workspace."""
        own = H * (padded_width(Dv, self.block_dv) + 2)
        return own + H * (self._merge(H, Dv)[0] + 2) if self.cluster > 1 else own

    @property
    def counters(self) -> int:
        """Return how many counters a row needs: none where its parts are one cluster, which meets at a barrier."""
        return 0 if self.splits == self.cluster else self.cluster

    def _merge(self, H: int, Dv: int) -> tuple[int, int]:
        """Return how many columns of the result a program merges at a time, and how many parts of them it loads."""
        values = MERGE_REGISTERS * 32 * self.num_warps // padded_heads(H)
        columns = next_power_of_2(-(-Dv // self.cluster))
        if self.cluster == 1:
            columns = max(16, min(self.block_dv, values // MERGE_UNROLL))
        return columns, min(max(values // columns, 1), 2 * MERGE_UNROLL if self.cluster > 1 else MERGE_UNROLL)

    def _tail(self, H: int) -> tuple[int, int]:
        """Return tokens per tile and stages of the loop over the tails: what whole tiles leave of each span."""
        if self.num_warps < 4 or self.block_l > 32 * self.num_warps:  # a masked tile as large takes many registers
            return 16, 2 if self.num_warps == 1 else 1
        # Of more than 32 heads products read K and V in shared memory (wgmma). Without a pipeline K and V take turns in
        # one buffer there, and where V's chunks are the narrower ones ptxas 12.8, which Triton 3.6 and 3.7 bring along,
        # then makes wrong code: addresses out of registers that hold something else.
        return self.block_l, 1 if self.load == "tma" and H <= 32 else 2

    def chunks(self, D: int, Dv: int) -> int:
        """Return into how many column chunks the wider cut of D and Dv falls; the kernel holds up to MAX_CHUNKS."""
        return max(-(-D // self.block_d), -(-Dv // self.block_dv))

    def problem(self, D: int, Dv: int) -> str | None:
        """Say what is expected in place of a launch that would compute these widths wrongly, or not at all."""
        if self.load not in LOADS:
            return f"a load of {', '.join(LOADS)}"
        if any(n < 16 or n & (n - 1) for n in (self.block_l, self.block_d, self.block_dv)):
            return "tiles and chunks that are powers of two from 16 on"
        if self.chunks(D, Dv) > MAX_CHUNKS:
            return f"at most {MAX_CHUNKS} column chunks of D={D} and of Dv={Dv}"
        if self.num_warps not in (1, 2, 4, 8, 16, 32) or self.num_stages < 1 or self.max_registers < 0:
            return "num_warps that is a power of two up to 32, a stage or more, and a limit on registers or 0"
        if self.splits < 1 or self.cluster < 1 or self.splits % self.cluster:
            return "splits that are a multiple of cluster"
        return None

    def constants(self, H: int, Dv: int, n_spans: int) -> dict[str, object]:
        """Return the kernel's compile-time arguments that follow from the launch, by name."""
        block_m, unroll = self._merge(H, Dv)
        tail_l, tail_stages = self._tail(H)
        return {
            "BLOCK_H": padded_heads(H),
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BLOCK_L": self.block_l,
            "BLOCK_N": span_bucket(n_spans),
            "BLOCK_M": block_m,
            "UNROLL": unroll,
            "SPLIT": self.splits > 1,
            "CLUSTER": self.cluster,
            "LOAD": self.load,
            "TAIL_L": tail_l,
            "TAIL_STAGES": tail_stages,
            # Where few warps share a tile, each thread's own sums would take too many registers.
            "LATE_SUM": self.num_warps >= 4 and padded_heads(H) * self.block_l <= 512 * self.num_warps,
        }


def span_bucket(n_spans: int) -> int:
    """Return the spans per row that the kernel of a row with n_spans is compiled for."""
    return next(bucket for bucket in SPAN_BUCKETS if n_spans <= bucket)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


def padded_heads(H: int) -> int:
    """Return the heads that a tile has: the least that a product can take, and a power of two."""
    return max(16, next_power_of_2(H))


def chunk_width(width: int) -> int:
    """Return the power of two that covers D or Dv in at most MAX_CHUNKS chunks: least padding, then widest."""
    candidates = [c for c in (256, 128, 64, 32, 16) if c * MAX_CHUNKS >= width and c < 2 * width]
    return min(candidates, key=lambda c: (-(-width // c) * c, -c))


def padded_width(width: int, block: int) -> int:
    """Return the columns of D or Dv with those that its last chunk adds."""
    return -(-width // block) * block


def shared_memory(config: LaunchConfig, H: int, D: int, Dv: int, element_bytes: int) -> int:
    """Estimate a program's shared memory in bytes: the tiles in flight, the exchange of scores and of the result.

    Products of fp32 run without tensor cores and take all their operands from there: q and the weights too.
    """
    k_columns, v_columns = padded_width(D, config.block_d), padded_width(Dv, config.block_dv)
    block_h = padded_heads(H)
    if config.num_stages > 1:
        columns = (config.num_stages - 1) * (k_columns + v_columns)
    elif element_bytes == 4 and config.load != "gather":
        columns = k_columns + v_columns
    else:  # without a pipeline K and V pass through shared memory one after the other
        columns = max(k_columns, v_columns)
    tiles = columns * config.block_l * element_bytes
    exchange = block_h * (config.block_l + config.block_dv) * 4
    operands = block_h * (config.block_l + k_columns) * 4 + 256 if element_bytes == 4 else 0
    return tiles + max(exchange, operands)
