"""Every layout, dtype, head count and width that the contract names, each through the gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa_sel import SelConfig, choose_route, reference, selection_attention, spans
from nsa_sel.bench.parallel import LARGEST_TEST_BYTES
from nsa_sel.bench.suite import gate

from . import given_kernel
from .fitting import ordinary, usual
from .parity_case import DEVICE, DTYPES, VIEWS, Case, check, here, row_lengths, rows, tensors

H_VALUES = (1, 4, 6, 8, 16, 64)
WIDTHS = (16, 64, 80, 128, 192, 256)
OTHER_WIDTHS = (32, 48, 96, 112, 144, 160, 176, 208, 224, 240)
MIXED = rows(
    [(0, 9), (30, 31), (31, 44)],  # touching
    [(5, 25), (10, 20), (10, 20)],  # overlapping and duplicated
    [(0, 0), (7, 3)],  # an empty row
    [(50, 67), (0, 12)],  # unordered, up to S_kv
    [(66, 67)],  # one token
)
MIXED_S_KV = 67


def dense(N: int, L: int) -> tuple[torch.Tensor, int]:
    q, k = torch.empty(N, 1, 1), torch.empty(N, L, 1)
    return spans.dense_rows(q, k, k)[3], L


def varlen(*lengths: int) -> tuple[torch.Tensor, int]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k = torch.empty(len(lengths), 1, 1), torch.empty(sum(lengths), 1)
    return spans.varlen_rows(q, k, k, cu_seqlens)[3], sum(lengths)


def in_place(S: int, G: int, S_kv: int, n_spans: int, longest: int) -> tuple[torch.Tensor, int]:
    starts = torch.randint(0, S_kv, (1, S, G, n_spans), generator=torch.Generator().manual_seed(1))
    lengths = torch.randint(0, longest + 1, starts.shape, generator=torch.Generator().manual_seed(2))
    return torch.stack((starts, (starts + lengths).clamp(max=S_kv)), -1), S_kv


def chosen_blocks(contexts: torch.Tensor, G: int, n: int, block: int) -> torch.Tensor:
    """Return n different causal blocks for every context [B, S]: the first, the row's own, then any; -1 for none."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.full((*contexts.shape, G, n), -1)
    for b, s, g in torch.cartesian_prod(*(torch.arange(size) for size in (*contexts.shape, G))).tolist():
        last = (int(contexts[b, s]) - 1) // block
        between = torch.randperm(max(last - 1, 0), generator=generator)[: n - 2] + 1
        picked = torch.cat((torch.tensor(sorted({0, last})), between))
        blocks[b, s, g, : len(picked)] = picked
    return blocks


def decode(contexts: list[int], G: int, n: int, block: int = 64) -> tuple[torch.Tensor, int]:
    t = torch.tensor(contexts).view(-1, 1)
    return spans.block_ranges(chosen_blocks(t, G, n, block), block, t.view(-1, 1, 1, 1)), max(contexts)


def prefill(S: int, G: int, n: int, block: int) -> tuple[torch.Tensor, int]:
    t = torch.arange(1, S + 1).view(1, S)
    return spans.block_ranges(chosen_blocks(t, G, n, block), block, t.view(1, S, 1, 1)), S


LAYOUTS = {
    "dense": (dense, here([(64, 1024), (1024, 256), (8, 4096), (3, 1)], [(4, 65), (3, 1)])),
    "varlen": (varlen, here([(1, 64, 65, 0, 1000, 4096, 63, 777), (17,) * 300], [(1, 64, 0, 65, 17)])),
    "in_place": (in_place, here([(256, 2, 4096, 8, 128), (16, 4, 4096, 64, 16)], [(3, 2, 90, 4, 40)])),
    "decode": (decode, here([([4096, 1, 777, 8000], 4, 16), ([65], 2, 16)], [([150, 1, 65], 2, 3)])),
    "prefill": (prefill, here([(512, 2, 16, 64), (100, 1, 4, 16)], [(9, 1, 3, 4)])),
}


@pytest.mark.contract("spans")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=[pytest.mark.much_memory] if layout == "prefill" else []) for layout in LAYOUTS],
)
def test_triton_sel_parity_of_every_layout(layout, dtype):
    H, D, Dv = (16, 192, 128) if layout in ("decode", "prefill") else (8, 128, 128)
    make, every_size = LAYOUTS[layout]
    for seed, sizes in enumerate(every_size):
        ranges, S_kv = make(*sizes)
        check(Case(ranges, S_kv, H=H, D=D, Dv=Dv, dtype=dtype, seed=seed))


# Each of the 36 pairs of widths once; H and the dtype turn with them so that every dtype meets every H, D and Dv.
SHAPES = [
    (DTYPES[(i + j) % 3], H_VALUES[(i + 2 * j + j // 3) % 6], D, Dv)
    for i, D in enumerate(WIDTHS)
    for j, Dv in enumerate(WIDTHS)
]
SHAPES += [(DTYPES[i % 3], H_VALUES[i % 6], D, OTHER_WIDTHS[-1 - i]) for i, D in enumerate(OTHER_WIDTHS)]
SHAPES += [(dtype, 64, 256, 256) for dtype in DTYPES]  # the largest


def test_the_shapes_cover_every_head_count_and_width_in_every_dtype():
    for dtype in DTYPES:
        of_dtype = [shape[1:] for shape in SHAPES if shape[0] == dtype]
        assert {H for H, _, _ in of_dtype} >= set(H_VALUES)
        assert {D for _, D, _ in of_dtype} >= set(WIDTHS)
        assert {Dv for _, _, Dv in of_dtype} >= set(WIDTHS)
    assert {D for _, _, D, _ in SHAPES} == {Dv for *_, Dv in SHAPES} == set(range(16, 257, 16))


@pytest.mark.contract
@pytest.mark.parametrize(("dtype", "H", "D", "Dv"), SHAPES)
def test_triton_sel_parity_of_every_shape(dtype, H, D, Dv):
    check(ordinary(MIXED, MIXED_S_KV, H=H, D=D, Dv=Dv, dtype=dtype))


@pytest.mark.contract
@pytest.mark.parametrize("int_dtype", (torch.int32, pytest.param(torch.int64, marks=pytest.mark.sanitizer)))
@pytest.mark.parametrize("view", VIEWS)
def test_triton_sel_parity_of_strided_tensors(view, int_dtype):
    case = ordinary(MIXED[:, :4], MIXED_S_KV, view=view)
    check(replace(case, ranges=case.ranges.repeat(2, 1, 2, 1, 1).to(int_dtype)))


@pytest.mark.contract
@pytest.mark.parametrize("H", (3, 9, 17, 33, 63))
def test_triton_sel_parity_of_padded_head_counts(H):
    check(ordinary(MIXED[:, :2], MIXED_S_KV, H=H, D=32, Dv=32, dtype=torch.float16))


@pytest.mark.contract
@pytest.mark.parametrize(("D", "Dv"), ((64, 16), (128, 32), (192, 96), (32, 16), (32, 128)))
def test_triton_sel_parity_of_many_heads_whose_keys_and_values_differ_in_chunks(D, Dv):
    """Spans of more than a tile and no whole number of them: for more than 32 heads the products read shared memory."""
    lengths = here((100, 64, 130, 171), (70, 64))
    ranges = rows([(200 * i + 7, 200 * i + 7 + n) for i, n in enumerate(lengths)], [(31, 31 + lengths[0])])
    check(Case(ranges, 800, H=here(56, 33), D=D, Dv=Dv))


@pytest.mark.sanitizer
def test_triton_sel_parity_without_length_hints():
    check(Case(MIXED, MIXED_S_KV, hints=False))


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_rows_without_tokens(dtype):
    everything_empty = rows([(0, 0), (9, 2)], [(5, 5), (-3, 0)], [(67, 70), (99, 200)])
    assert (check(Case(everything_empty, MIXED_S_KV, **usual(dtype=dtype, hints=False))) == 0).all()
    case = ordinary(MIXED, MIXED_S_KV, dtype=dtype)
    empty = torch.tensor(row_lengths(case.ranges, case.S_kv)) == 0
    assert (check(case)[0, empty] == 0).all()


@pytest.mark.contract("spans")
@pytest.mark.parametrize("n_spans", (1, 2, 3, 7, 8, 9, 33, pytest.param(64, marks=pytest.mark.sanitizer)))
def test_triton_sel_parity_of_every_number_of_spans(n_spans):
    check(Case(rows([(2 * i, 2 * i + 1 + i % 3) for i in range(n_spans)], [(5, 90)]), 140, **usual()))


@pytest.mark.contract
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_large_logits(dtype):
    ranges = rows([(0, here(1000, 130))], [(3, 5), (90, 100)], [(8, 9)])
    check(ordinary(ranges, 1000, dtype=dtype, q_factor=40))  # the gate asks for finite values


@pytest.mark.public
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_the_public_function(dtype):
    from nsa_sel.kernel import launch

    case = Case(MIXED, MIXED_S_KV, dtype=dtype)
    q, k, v, ranges = tensors(case)
    for scale in (None, 0.3):
        before = launch.launch_count()
        out = selection_attention(q, k, v, ranges, scale=scale, backend="triton")
        assert launch.launch_count() > before
        want, packed = (f(q, k, v, ranges, scale=scale) for f in (reference.oracle, reference.packed_sdpa))
        verdict = gate.check(out, want, packed, dtype=dtype)
        assert verdict.ok, verdict.message


@pytest.mark.public
def test_triton_sel_parity_of_the_route_that_auto_takes():
    """`auto` runs the kernel on a GPU when it is told to, and never in the interpreter."""
    from nsa_sel.kernel import launch

    case = Case(MIXED, MIXED_S_KV)
    check(case)
    q, k, v, ranges = tensors(case)
    config = SelConfig.load(env={"NSA_USE_TRITON_SEL": "1", "NSA_SEL_TRITON_MIN_L": "1"})
    before = launch.launch_count()
    out = selection_attention(q, k, v, ranges, config=config)
    route = choose_route(q, k, v, ranges, config=config)
    assert (launch.launch_count() > before) == (DEVICE == "cuda") == (route.backend == "triton"), route
    assert gate.check(out, reference.oracle(q, k, v, ranges), None, dtype=case.dtype).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sdpa_references_pass_the_same_gate(dtype):
    case = Case(MIXED, MIXED_S_KV, H=6, D=80, Dv=16, dtype=dtype)
    q, k, v, ranges = tensors(case)
    want, packed = reference.oracle(q, k, v, ranges), reference.packed_sdpa(q, k, v, ranges)
    for out in (packed, reference.masked_sdpa(q, k, v, ranges)):
        verdict = gate.check(out, want, packed, dtype=dtype)
        assert verdict.ok, verdict.message


@pytest.mark.parametrize(
    ("S_kv", "n_spans", "stride", "wide"),
    [
        (2**20, 64, 64, False),
        (2**25, 1, 64, True),  # offsets: tokens times stride
        (2**25 - 2, 1, 64, False),
        (2**20, 1, 2**11, True),  # few tokens, far apart
        (2**24 - 1, 128, 64, False),  # places: tokens times spans
        (2**25 - 1, 64, 32, True),  # the last tile of such a row ends past 2**31
    ],
)
def test_places_and_offsets_take_64_bits_where_32_are_too_few(S_kv, n_spans, stride, wide):
    from nsa_sel.kernel import launch
    from nsa_sel.kernel.launch_config import LaunchConfig

    q = torch.empty(1, 1, 1, 4, 32, dtype=torch.bfloat16, device="meta")
    kv = torch.empty_strided((1, 1, S_kv, 32), (S_kv * stride, 1, stride, 1), dtype=torch.bfloat16, device="meta")
    ranges = torch.empty(1, 1, 1, n_spans, 2, dtype=torch.int32, device="meta")
    plan = launch.Plan(q, kv, kv, ranges, None, None, None, LaunchConfig("gather", 128, 32, 32, 4, 2))
    assert plan.values["WIDE"] is wide


@pytest.mark.contract("spans")
@pytest.mark.much_memory
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 4.3 GB of GPU memory")
@pytest.mark.parametrize("where", ("token", "group"))
def test_triton_sel_parity_beyond_two_to_the_31_elements(where):
    """Touch K and V past their 2**31st element, reached through the token's stride or through the group's."""
    D, beyond = 128, 2**31
    free, _ = torch.cuda.mem_get_info()
    # A given kernel's K and V are copied, to see if they are written.
    needed = LARGEST_TEST_BYTES if given_kernel.under_test is None else 16e9
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, found {free / 1e9:.1f}")
    tail = 4096  # tokens around the 2**31st element; the rest of the buffer is never selected
    buffer = torch.full((beyond + tail * D,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    buffer[: tail * D].normal_()
    buffer[beyond - tail * D :].normal_()
    spans_of_rows = [(100, 400), (7, 8)], [(0, 1), (10, 90)]
    if where == "token":
        S_kv, G = buffer.numel() // D, 1
        k, last = buffer.view(1, 1, S_kv, D), beyond // D
        ranges = rows([(last - 50, last + 50), (last + 1000, S_kv)], [(S_kv - 1, S_kv), (last - 1, last)])
        own = [(k[:, :, last - tail :], ranges - (last - tail))]
    else:
        G = 2
        k = buffer.as_strided((1, G, tail, D), (beyond + tail * D, beyond, D, 1))
        ranges = rows(*spans_of_rows).repeat(1, 1, G, 1, 1)
        own = [(k[:, g : g + 1].contiguous(), ranges[:, :, g : g + 1]) for g in range(G)]
    q = torch.randn(1, 2, G, 8, D, device=DEVICE).bfloat16()
    out = run_large(q, k, ranges.to(DEVICE))
    want = torch.cat(
        [reference.oracle(q[:, :, g : g + 1], part, part, near.to(DEVICE)) for g, (part, near) in enumerate(own)], 2
    )
    verdict = gate.check(out, want, None, dtype=torch.bfloat16)
    assert verdict.ok, verdict.message


def run_large(q: torch.Tensor, k: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    kernel = given_kernel.under_test
    if kernel is not None:
        if (reason := kernel.unsupported(q, k, k, ranges)) is not None:
            pytest.skip(f"{kernel.name}: {reason}")
        L = spans.lengths(ranges, k.shape[2])
        watched = replace(kernel, function=given_kernel.watched(kernel.function))
        return watched(q, k, k, ranges, min_len=int(L.min()), max_len=int(L.max()))
    from nsa_sel.kernel import launch

    out = torch.full_like(q, float("nan"))
    return launch.forward(q, k, k, ranges, out=out)


@pytest.mark.contract
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_sel_parity_of_padded_widths(dtype):
    check(ordinary(MIXED, MIXED_S_KV, H=6, D=80, Dv=48, dtype=dtype))


@pytest.mark.public
@pytest.mark.sanitizer
def test_triton_sel_parity_of_empty_batches_contexts_and_span_lists():
    check(Case(MIXED, MIXED_S_KV))
    no_spans, no_context = MIXED[:, :, :, :0], torch.zeros_like(MIXED)
    assert (check(Case(no_spans, MIXED_S_KV)) == 0).all()
    assert (check(Case(no_context, 0)) == 0).all()
    q, k, v, ranges = tensors(Case(MIXED, MIXED_S_KV))
    nothing = selection_attention(q[:0], k[:0], v[:0], ranges[:0], backend="triton")
    assert nothing.shape == (0, 5, 1, 4, 64)
    assert selection_attention(q[:, :0], k, v, ranges[:, :0], backend="triton").shape == (1, 0, 1, 4, 64)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_rounds_to_bf16_as_hardware_does():
    from .interpreter_bf16 import round_to_bf16

    edges = [
        0.0,
        -0.0,
        1.0,
        1.00390625,
        1.01171875,
        3.4e38,
        -3.4e38,
        float("inf"),
        -float("inf"),
        float("nan"),
        1e-40,
        9e-39,
    ]
    x = torch.cat((torch.randn(10000), torch.tensor(edges)))
    got = torch.from_numpy(round_to_bf16(x.numpy()).view("int16")).view(torch.bfloat16)
    torch.testing.assert_close(got, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_multiplies_bf16_by_its_value():
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    a, b, d = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16(), torch.zeros(16, 16)
    left, right = (TensorHandle(x.view(torch.int16).numpy().view("uint16"), bfloat16) for x in (a, b))
    out = InterpreterBuilder().create_dot(left, right, TensorHandle(d.numpy(), float32), None, 0)
    torch.testing.assert_close(torch.from_numpy(out.data), a.float() @ b.float())
