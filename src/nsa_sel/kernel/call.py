"""What a launch is chosen by: the sizes of a call, and the GPU that it runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """Describe a call by everything that its launch may depend on.

    N: rows, B·S·G. H: heads per group. D, Dv: widths. n_spans: spans per row. max_len: L of the longest row in tokens;
    where that is not known, S_kv rounded down to a power of two. shared_kv: several rows of a group attend to the same
    K and V (S > 1). element_bytes: 2 or 4. one_length: every row has max_len tokens. fits_tma: K and V are laid out as
    TMA descriptors need them.
    """

    N: int
    H: int
    D: int
    Dv: int
    n_spans: int
    max_len: int
    shared_kv: bool = False
    element_bytes: int = 2
    one_length: bool = False
    fits_tma: bool = True


@dataclass(frozen=True)
class Gpu:
    """Describe a GPU by what decides which launches can run on it.

    shared_bytes: shared memory that one program may use. has_tma: TMA descriptors can be made for it here.
    has_clusters: programs of a row can merge as a thread-block cluster.
    """

    name: str
    sm_count: int
    shared_bytes: int
    has_tma: bool
    has_clusters: bool
