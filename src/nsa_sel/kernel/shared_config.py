"""The launch of a call in which neighbouring queries share tiles of KV, and which calls those are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .call import Call, Gpu
from .kv import MAX_TMA_ROWS
from .launch_config import LaunchConfig, chunk_width, next_power_of_2, padded_width, span_bucket

# By GPU: from how many visits per KV tile on a query tile of 64 rows shares. Only GPUs named here share at all.
# On an H200 (bf16, H=16, D=128, rows of 16 blocks of 64) a tile that is shared takes 3.7 to 3.9 ns of the whole GPU,
# and a query tile 18 ns besides; a row takes 40 ns with a context of 4096, and 48 with one of 16384. So four queries
# pay from 1.7 visits per tile on at 4096, and from 1.4 at 16384.
BREAK_EVEN = {"NVIDIA H200": 1.6}
MAX_INDEX_BYTES = 2**28  # of the coverage index; a larger call is computed row by row
# How much work, rows times tokens, makes up for the index and for kernels that have nothing to do: where it is certain
# that queries share, and where not. On an H200 those take 10 to 20 us, and one row 40 ns.
CERTAIN_WORK, UNCERTAIN_WORK = 2**21, 2**24
SHORTEST_UNCERTAIN = 1024  # tokens of a row: shorter ones are done before an index pays, unless queries must share
FEWEST_QUERIES = 3.5  # of a query tile, on average: three that select at random gain nothing
MAX_SHARED_SPANS = 64  # per row: a partial tile costs time for each
SHORTEST_SPANS = 64  # tokens per span, on average: shorter ones make every tile partial, or more of them
WIDEST = 128  # D and Dv: of wider ones two programs do not fit on an SM, and selections at random lose
LONGEST_CONTEXT = 32  # times max_len: the index of a row grows with its context, the row itself does not


@dataclass(frozen=True)
class SharedLaunch:
    """Name every choice of a call whose queries may share tiles.

    rows: rows of a product, queries of a query tile times padded heads. block_t: tokens of a KV tile. block_d,
    block_dv: columns per chunk of D and Dv. num_warps, num_stages: of the shared kernel; partial_stages: of its loop
    over partial tiles, 0 if its first loop takes those as well. tma: K and V through descriptors. break_even: visits
    per KV tile from which on a query tile shares, 0 for always. rest_rows: how many rows a program of the others has,
    if none shares. max_registers: of a thread of the shared kernel; 0: no limit.
    """

    rows: int
    block_t: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    partial_stages: int = 2
    tma: bool = False
    break_even: float = 0.0
    rest_rows: int = 1
    max_registers: int = 0

    def __str__(self) -> str:
        return (
            f"shared R{self.rows} BT{self.block_t} BD{self.block_d} BDV{self.block_dv} w{self.num_warps} "
            f"s{self.num_stages}+{self.partial_stages}{' tma' if self.tma else ''} x{self.break_even:g}"
            f"{f' r{self.max_registers}' if self.max_registers else ''}"
        )

    @property
    def options(self) -> dict[str, int]:
        """Return what `_sel_shared` is compiled with."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def queries(self, H: int) -> int:
        """Return the queries of a query tile."""
        return max(1, self.rows // next_power_of_2(H))

    def problem(self, H: int, D: int, Dv: int) -> str | None:
        """Say what is expected in place of a launch that would compute these sizes wrongly, or not at all."""
        if self.rows & (self.rows - 1) or not max(16, next_power_of_2(H)) <= self.rows <= 64 * next_power_of_2(H):
            return "rows that are a power of two from 16 on, for 1 to 64 queries"
        if min(self.block_d, 64) != min(self.block_dv, 64):
            return "chunks of K and V of 16 columns, of 32, or of 64 and more"
        loop = LaunchConfig("whole", self.block_t, self.block_d, self.block_dv, self.num_warps, self.num_stages)
        return loop.problem(D, Dv)

    def constants(self, H: int, n_spans: int) -> dict[str, int]:
        """Return the compile-time arguments of `_sel_shared` that follow from the launch, by name."""
        return {
            "TQ": self.queries(H),
            "HEADS": next_power_of_2(H),
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BLOCK_T": self.block_t,
            "TMA": self.tma,
            "BLOCK_N": span_bucket(n_spans),
            "UNROLL": min(next_power_of_2(n_spans), 8),
            "PARTIAL_STAGES": self.partial_stages,
        }

    def cover_constants(self, H: int, n_spans: int, S_kv: int) -> dict[str, int]:
        """Return the compile-time arguments of `_cover` that follow from the launch, by name."""
        TQ = self.queries(H)
        all_words = -(-S_kv // (32 * self.block_t))
        words = min(next_power_of_2(all_words), max(1, 128 // TQ))
        spans = min(next_power_of_2(n_spans), max(1, 32 // (TQ * words)))
        unroll = min(next_power_of_2(n_spans) // spans, 8)
        constants = {"TQ": TQ, "BLOCK_T": self.block_t, "WORDS": words, "SPANS": spans, "UNROLL": unroll}
        return constants | {"ONCE": words >= all_words}

    def cover_warps(self, words: int, H: int) -> int:
        """Return the warps of `_cover`, which takes so many words of each query at a time: as measured on an H200."""
        queries = self.queries(H)
        return 1 if queries * words <= 64 else 2 if queries <= 16 else 4


def chunk_widths(D: int, Dv: int) -> tuple[int, int]:
    """Return the columns per chunk of D and of Dv: with one swizzle, that of 64 columns and more, of 32, or of 16.

    In a loop without pipeline K and V take turns in one buffer, and where V's swizzle is another ptxas 12.8, which
    Triton 3.6 and 3.7 bring along, makes wrong code.
    """
    block_d, block_dv = chunk_width(D), chunk_width(Dv)
    least = min(64, max(block_d, block_dv))
    return max(block_d, least), max(block_dv, least)


def row_of(config: LaunchConfig) -> LaunchConfig:
    """Return the launch of the rows that share nothing, from that of a call of such rows.

    The loop over rows takes more registers than a row, and shared memory is what is scarce.
    """
    return replace(config, splits=1, cluster=1, max_registers=0)


def shared_bytes(launch: SharedLaunch, D: int, Dv: int, element_bytes: int) -> int:
    """Estimate a program's shared memory in bytes: tiles in flight, q, and the exchange of weights and result."""
    k_columns, v_columns = padded_width(D, launch.block_d), padded_width(Dv, launch.block_dv)
    tiles = max(launch.num_stages - (0 if launch.tma else 1), 1) * (k_columns + v_columns) * launch.block_t
    return (tiles + launch.rows * k_columns) * element_bytes + launch.rows * launch.block_t * 4


def choose(call: Call, gpu: Gpu, S: int, S_kv: int) -> SharedLaunch | None:
    """Choose the launch of a call of S queries per sequence on a GPU of BREAK_EVEN; None: row by row is better."""
    break_even = BREAK_EVEN[gpu.name]
    if not call.shared_kv or call.element_bytes != 2 or S_kv > MAX_TMA_ROWS:
        return None
    if call.n_spans > MAX_SHARED_SPANS or call.max_len < SHORTEST_SPANS * call.n_spans:
        return None
    if max(call.D, call.Dv) > WIDEST or S_kv > LONGEST_CONTEXT * call.max_len:
        return None
    launch = default(call, gpu, break_even)
    tiles_of_sequence = -(-S // launch.queries(call.H))
    query_tiles = call.N // S * tiles_of_sequence
    if tiles_of_sequence * FEWEST_QUERIES > S or query_tiles < 2 * gpu.sm_count:
        return None
    queries = min(launch.queries(call.H), S)  # of a query tile
    certain = queries * call.max_len >= launch.break_even * S_kv  # long rows share so much, whatever they select
    if call.N * call.max_len < (CERTAIN_WORK if certain else UNCERTAIN_WORK):
        return None
    # In a prefill from its start the first queries share at least.
    if not certain and (S_kv > S or call.max_len < SHORTEST_UNCERTAIN):
        return None
    return launch if shared_bytes(launch, call.D, call.Dv, 2) <= gpu.shared_bytes else None


def default(call: Call, gpu: Gpu, break_even: float) -> SharedLaunch:
    """Return a launch of 64 rows and KV tiles of 64, or 32 if spans are shorter, with the stages that fit."""
    tma = gpu.has_tma and call.fits_tma and call.element_bytes == 2
    block_t = 64 if call.max_len >= 64 * call.n_spans else 32
    launch = SharedLaunch(64, block_t, *chunk_widths(call.D, call.Dv), 4, 3, 2, tma, break_even)
    if call.element_bytes == 4:  # products of fp32 take their operands from shared memory, and many registers
        launch = replace(launch, rows=32, block_t=32, num_warps=8, num_stages=1)
    while launch.num_stages > 1 and shared_bytes(launch, call.D, call.Dv, call.element_bytes) > gpu.shared_bytes:
        launch = replace(launch, num_stages=launch.num_stages - 1)
    return launch
