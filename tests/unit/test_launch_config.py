"""What follows from a launch: shared memory, column chunks, counters and span buckets."""

from __future__ import annotations

import pytest

from nsa_sel.kernel.launch_config import MAX_CHUNKS, MAX_SPANS, SPAN_BUCKETS, LaunchConfig, chunk_width, shared_memory


@pytest.mark.parametrize(
    ("H", "D", "Dv", "launch", "compiled"),
    [
        (64, 256, 64, ("gather", 32, 256, 64, 4, 2), 114_944),
        (16, 128, 48, ("whole", 64, 128, 16, 4, 3), 102_400),
        (17, 256, 32, ("whole", 64, 256, 32, 4, 2), 114_816),
        (64, 256, 256, ("whole", 16, 256, 256, 4, 1), 102_656),
        (64, 256, 256, ("gather", 16, 256, 256, 4, 1), 86_272),
    ],
)
def test_the_estimate_for_fp32_is_not_below_what_was_compiled_for_sm_89(H, D, Dv, launch, compiled):
    estimate = shared_memory(LaunchConfig(*launch), H, D, Dv, 4)
    assert compiled <= estimate <= 1.1 * compiled


@pytest.mark.parametrize("width", range(16, 257, 16))
def test_chunks_cover_a_width_with_little_padding(width):
    chunk = chunk_width(width)
    chunks = -(-width // chunk)
    assert chunks <= MAX_CHUNKS
    assert chunk & (chunk - 1) == 0
    assert chunks * chunk - width < max(chunk, 64)
    assert chunk_width(192) == 64


def test_one_cluster_a_row_needs_no_counters():
    """Captured calls have few to give away, and past them each graph sets its own to zero."""
    counters = {
        (splits, cluster): LaunchConfig("tma", 64, 128, 128, 4, 3, splits, 0, cluster).counters
        for splits, cluster in ((8, 8), (16, 8), (8, 1), (2, 2), (4, 2))
    }
    assert counters == {(8, 8): 0, (16, 8): 8, (8, 1): 1, (2, 2): 0, (4, 2): 2}


def test_the_span_count_is_compiled_in_few_buckets():
    config = LaunchConfig("gather", 64, 128, 128, 4, 2)
    compiled = {config.constants(8, 128, n_spans)["BLOCK_N"] for n_spans in range(MAX_SPANS + 1)}
    assert compiled == set(SPAN_BUCKETS)
