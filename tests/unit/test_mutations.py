"""Deliberate faults: each is planted in a copy of the package, and the named test of the suite must fail there."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from pathlib import Path

import fault_run
import pytest
import torch

from nsa_sel.bench.timer import timing

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux"),
    reason="the faults are planted where the kernel runs in Triton's interpreter",
)
ROOT = Path(__file__).parents[2]
LAYOUTS = "tests/parity/test_layouts.py::test_triton_sel_parity_"
ONE_RUN = LAYOUTS + "without_length_hints"
GRADIENTS = "tests/parity/test_gradients.py::test_triton_sel_parity_of_gradients_"
SHARED_GRADIENTS = "tests/parity/test_shared_gradients.py::test_triton_sel_parity_of_gradients_of_shared_tiles_"
SHARED = "tests/parity/test_shared.py::test_triton_sel_parity_of_shared_tiles_"


@dataclass(frozen=True)
class Fault:
    """Name a fault: what to write in place of which text (there once) of which file, and the test that sees it."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str


FAULTS = [
    Fault(
        "a span's end is off by one",
        "spans.py",
        "return starts, torch.maximum(bounds[..., 1], starts)",
        "return starts, torch.maximum(bounds[..., 1] - 1, starts)",
        "tests/unit/test_spans.py::test_every_pair_of_spans_over_four_tokens",
    ),
    Fault(
        "the kernel reads one token past a span",
        "kernel/tiles.py",
        "end = tl.minimum(tl.maximum(end, 0), S_kv)",
        "end = tl.minimum(tl.maximum(end, 0) + 1, S_kv)",
        ONE_RUN,
    ),
    Fault(
        "the running maximum grows and the sums are not rescaled",
        "kernel/tiles.py",
        "l_i = l_i * alpha[:, None] + p if len(l_i.shape) == 2 else l_i * alpha + tl.sum(p, 1)",
        "l_i = l_i + p if len(l_i.shape) == 2 else l_i + tl.sum(p, 1)",
        LAYOUTS + "of_large_logits",
    ),
    Fault(
        "the scale is taken from the width of V",
        "kernel/launch.py",
        "(D**-0.5 if scale is None else scale) * LOG2_E",
        "(Dv**-0.5 if scale is None else scale) * LOG2_E",
        LAYOUTS + "of_padded_widths",
    ),
    Fault(
        "the last tile is dropped",
        "kernel/forward.py",
        "hi = tl.cdiv(n_tokens, BLOCK_L)",
        "hi = tl.maximum(tl.cdiv(n_tokens, BLOCK_L) - 1, 0)",
        ONE_RUN,
    ),
    Fault(
        "what whole tiles leave of a span is dropped",
        "kernel/forward.py",
        "hi = n_tiles + n_tails",
        "hi = n_tiles",
        "tests/parity/test_invariants.py::test_triton_sel_parity_of_integers_outside_the_context[index0-whole]",
    ),
    Fault(
        "the groups are swapped",
        "kernel/forward.py",
        "k_row = k_ptr + (b * stride_kb + g * stride_kg)",
        "k_row = k_ptr + (b * stride_kb + (G - 1 - g) * stride_kg)",
        LAYOUTS + "of_strided_tensors[plain-int_dtype0]",
    ),
    Fault(
        "a context that grows keeps the length that it was planned with",
        "kernel/kv.py",
        "arguments = (*arguments[:at], S_kv, *arguments[at + 1 :])",
        "pass",
        "tests/parity/test_growing.py::test_triton_sel_parity_of_one_buffer_at_many_lengths[hints]",
    ),
    Fault(
        "K and V that lie elsewhere keep the strides that they were planned with",
        "kernel/kv.py",
        "for at, value in zip(self.at, (lie[0][2], *outer), strict=True):",
        "for at, value in zip(self.at, (lie[0][2], *self.__dict__.setdefault('first', outer)), strict=True):",
        "tests/parity/test_growing.py::test_triton_sel_parity_of_a_cache_that_torch_cat_makes_anew[hints]",
    ),
    Fault(
        "the last page of a block comes from the table's next entry",
        "spans.py",
        "place = block_table.long().gather(1, page.clamp(0, n_pages - 1)",
        "place = block_table.long().gather(1, (page + (page % 2)).clamp(0, n_pages - 1)",
        "tests/parity/test_paged.py::test_triton_sel_parity_of_a_prefix_that_two_sequences_share[NHD]",
    ),
    Fault(
        "every group reads the first group's pages",
        "spans.py",
        "place = place * G + torch.arange(G, device=blocks.device).view(G, 1, 1)",
        "place = place * G",
        "tests/parity/test_paged.py::test_triton_sel_parity_of_a_prefix_that_two_sequences_share[HND]",
    ),
    Fault(
        "the parts of a split row are added without their weights",
        "kernel/merge.py",
        "acc += part * beta[:, None]",
        "acc += part",
        "tests/parity/test_variants.py::test_triton_sel_parity_of_column_chunks[16-64]",
    ),
    Fault(
        "padding is not masked",
        "spans.py",
        "valid = place < L\n",
        "valid = place < L.amax()\n",
        "tests/unit/test_spans.py::test_every_pair_of_spans_over_four_tokens",
    ),
    Fault(
        "SDPA is causal, so that one query of packed rows sees key 0 alone",
        "reference.py",
        "attn_mask=attn_mask, scale=scale)\n    return out",
        "is_causal=True, scale=scale)\n    return out",
        "tests/unit/test_reference.py::test_both_sdpa_forms_pass_the_gate",
    ),
    Fault(
        "the threshold is exclusive",
        "routing.py",
        "if length < threshold:",
        "if length <= threshold:",
        "tests/unit/test_routing.py::test_the_threshold_is_inclusive",
    ),
    Fault(
        "Triton asked for by name falls back in silence",
        "routing.py",
        """raise UnsupportedError(f"backend: value is 'triton', which cannot run this call: {obstacle}")""",
        """return Route("packed_sdpa", obstacle)""",
        "tests/unit/test_routing.py::test_triton_asked_for_by_name_never_falls_back",
    ),
    Fault(
        "runs are compared by their means",
        "bench/saved/run.py",
        'median_us=positive(stats, "median") * 1e6',
        'median_us=positive(stats, "mean") * 1e6',
        "tests/unit/test_regress.py::test_medians_decide_and_means_do_not",
    ),
    Fault(
        "a missing case passes",
        "bench/compare/result.py",
        "if self.different_gpu or not self.compared or self.regressions or self.missing:",
        "if self.different_gpu or not self.compared or self.regressions:",
        "tests/unit/test_regress.py::test_what_was_asked_for_and_not_measured_is_missing",
    ),
    Fault(
        "a last tile that is not full is read to its end",
        "kernel/forward.py",
        "position = tl.minimum(position, n_tokens - 1)",
        "position = position",
        "tests/parity/test_invariants.py::test_triton_sel_parity_does_not_see_what_is_not_selected[float('nan')-dtype1]",
    ),
    Fault(
        "the timer does not wait for the device",
        "bench/timer/timing.py",
        "            self.tick()\n        end.event.synchronize()\n        return start",
        "            self.tick()\n        return start",
        "tests/unit/test_mutations.py::test_the_timer_waits_for_its_end_event",
    ),
    Fault(
        "the mask of a partial tile is off by one",
        "kernel/shared_tiles.py",
        "last = tl.where(left != 0, 0, last)",
        "last = tl.where(left != 0, 0, last - 1)",
        SHARED + "in_prefill[local-dtype1]",
    ),
    Fault(
        "the mask of a partial tile in which a query has several spans is off by one",
        "kernel/shared_tiles.py",
        "held = bits_between((start - first_token)[:, None],",
        "held = bits_between((start - first_token + 1)[:, None],",
        SHARED + "beside_rows_of_their_own[0.0-2]",
    ),
    Fault(
        "a key that is selected twice weighs once",
        "kernel/shared_tiles.py",
        "p *= times.to(tl.float32)",
        "p *= 1.0",
        SHARED + "beside_rows_of_their_own[0.0-2]",
    ),
    Fault(
        "two queries of a query tile have each other's whole tiles",
        "kernel/shared.py",
        "chosen = ((who >> query) & 1) != 0",
        "chosen = ((who >> (query ^ 1)) & 1) != 0",
        SHARED + "in_prefill[random-dtype1]",
    ),
    Fault(
        "a tile that one query selects in part counts as whole",
        "kernel/coverage.py",
        "partly = touched & (twice | ~tl.reduce(covered, 1, either))",
        "partly = touched & twice",
        SHARED + "beside_rows_of_their_own[0.0-2]",
    ),
    Fault(
        "NaN in V of a key that only some queries select reaches the others",
        "kernel/shared.py",
        "spoilt |= has_nan(acc0)",
        "spoilt |= 0",
        SHARED + "keeps_apart_what_only_some_queries_select[v-float('nan')-2]",
    ),
    Fault(
        "the rows of query tiles that do not share are not computed",
        "kernel/shared.py",
        "if tl.load(count_ptr + 2 * query_tile) < 0:",
        "if tl.load(count_ptr + 2 * query_tile) < -1:",
        SHARED + "beside_rows_of_their_own[1.2-2]",
    ),
    Fault(
        "the gradients forget delta",
        "kernel/backward_rows.py",
        "tl.store(stat_at + 1, -delta,",
        "tl.store(stat_at + 1, -delta * 0,",
        GRADIENTS + "of_any_width[3-48-16-dtype1]",
    ),
    Fault(
        "the gradient of k is scaled twice",
        "kernel/backward_keys.py",
        "of_k = of_v * tl.where(is_chunk, 1.0, scale)",
        "of_k = of_v * scale * tl.where(is_chunk, 1.0, scale)",
        GRADIENTS + "of_any_width[3-48-16-dtype1]",
    ),
    Fault(
        "the last row of a chunk of a popular tile is dropped",
        "kernel/backward_keys.py",
        "hi = tl.minimum(lo + size, n_all)",
        "hi = tl.minimum(lo + size, n_all) - is_chunk.to(tl.int32)",
        GRADIENTS + "where_tiles_are_shared_and_cut[dtype0-False]",
    ),
    Fault(
        "a key that is selected twice has the gradient of one that is selected once",
        "kernel/backward_products.py",
        "p *= times",
        "p *= tl.where(times > 0, 1.0, 0.0)",
        GRADIENTS + "of_any_width[3-48-16-dtype1]",
    ),
    Fault(
        "NaN in q of one row reaches keys that it does not select",
        "kernel/backward_keys.py",
        "q0, q1, q2, q3 = clear_rows(q0, q1, q2, q3, bad)",
        "q0 = q0",
        GRADIENTS + "keeps_apart_a_row_that_is_not_finite[q-nan]",
    ),
    Fault(
        "a row that is not finite is summed as if it were",
        "kernel/backward_index.py",
        "other = partly & (twice | odd[:, None])",
        "other = partly & twice",
        GRADIENTS + "keeps_apart_a_row_that_is_not_finite[dout-inf]",
    ),
    Fault(
        "a query gives to the key behind its span",
        "kernel/backward_keys.py",
        "& (here[:, None] < until[None, :])",
        "& (here[:, None] <= until[None, :])",
        GRADIENTS + "of_any_width[3-48-16-dtype1]",
    ),
    Fault(
        "NaN in K of a key that only some queries select reaches the others' dq",
        "kernel/backward_shared.py",
        "spoilt |= has_nan(dq0)",
        "spoilt |= 0",
        SHARED_GRADIENTS + "keeps_apart_what_only_some_queries_select[k-float('nan')]",
    ),
    Fault(
        "dq of a query that does not select a whole tile takes it",
        "kernel/backward_shared.py",
        "tl.where(((who >> query) & 1) != 0, lse2,",
        "tl.where(who != 0, lse2,",
        SHARED_GRADIENTS + "in_prefill[random-dtype0]",
    ),
    Fault(
        "dq of query tiles that do not share is left out",
        "kernel/backward_rows.py",
        "if n_whole < 0:",
        "if n_whole < -1:",
        SHARED_GRADIENTS + "beside_rows_of_their_own",
    ),
    Fault(
        "the gradient of the LSE is left out",
        "kernel/backward_rows.py",
        "delta -= tl.load(dlse_ptr",
        "delta -= 0 * tl.load(dlse_ptr",
        GRADIENTS + "where_tiles_are_shared_and_cut[dtype1-True]",
    ),
]
if importlib.util.find_spec("triton.tools.tensor_descriptor"):  # Triton 3.4
    DESCRIPTORS = "tests/parity/test_paged.py::test_triton_sel_parity_of_descriptors_of_a_paged_cache"
    CONFIG = "tma BL64 BD64 BDV64 w4 s2 split1"
    FAULTS += [
        Fault(
            "descriptors read V of another group",
            "kernel/forward.py",
            "col_v = (g * stride_vg * UNIT).to(tl.int32)",
            "col_v = ((G - 1 - g) * stride_vg * UNIT).to(tl.int32)",
            f"{DESCRIPTORS}[{CONFIG}-64-64-NHD]",
        ),
        Fault(
            "what lies behind a group's columns is not cleared",
            "kernel/tiles.py",
            "tile = tl.where((offs < WIDTH)[None, :], tile, 0.0)",
            "tile = tile",
            f"{DESCRIPTORS}[{CONFIG}-80-48-NHD]",
        ),
        Fault(
            "values beyond the end of a span are not masked",
            "kernel/tiles.py",
            "tile = tl.where(mask_l[:, None], tile, 0.0)",
            "tile = tile",
            "tests/parity/test_invariants.py::test_triton_sel_parity_does_not_see_what_is_not_selected[float('nan')-dtype1]",
        ),
    ]


def copy(folder: Path, fault: Fault | None) -> Path:
    """Copy the package and its suite into `folder`, and plant the fault."""
    for name in ("src", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, folder)
    if fault is not None:
        path = folder / "src" / "nsa_sel" / fault.file
        text = path.read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, (
            f"{fault.file}: {fault.old!r} stands {text.count(fault.old)} times, expected 1"
        )
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Iterator[dict[str, AsyncResult]]:
    """Begin all runs, two at a time; the run without a fault is that of the name "none"."""
    every = sorted({fault.caught_by for fault in FAULTS})
    with fault_run.processes(2) as pool:
        found = {"none": pool.apply_async(fault_run.run, (copy(tmp_path_factory.mktemp("none"), None), every))}
        for fault in FAULTS:
            folder = copy(tmp_path_factory.mktemp("fault"), fault)
            found[fault.name] = pool.apply_async(fault_run.run, (folder, [fault.caught_by]))
        yield found


@interpreted
def test_without_a_fault_these_tests_pass(outcomes):
    code, said = outcomes["none"].get(300)
    assert code == pytest.ExitCode.OK, said


@interpreted
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(outcomes, fault):
    code, said = outcomes[fault.name].get(300)
    assert code == pytest.ExitCode.TESTS_FAILED and "1 failed" in said, said


class Event:
    """Stand in for a CUDA event of a device that is behind the host."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: Event) -> float:
        if not end.passed:
            raise RuntimeError("device not ready")
        return 2.5


def test_the_timer_waits_for_its_end_event():
    timer = object.__new__(timing.DeviceTimer)
    start, end = (types.SimpleNamespace(event=Event()) for _ in range(2))
    assert timer.elapsed(start, end) == 2.5e-3
