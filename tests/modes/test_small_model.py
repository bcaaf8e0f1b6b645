"""A real model from end to end: trained with the reference forms and the kernel, then generating token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mode_case import DEVICE, ON_GPU, needs_gpu
from small_model import LAYERS, MAX_LEN, Cache, Model, attend, sequences

LENGTH = 64
STEPS = 30


def train(backend: str, steps: int, n: int = 8, length: int = LENGTH) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(length, device=DEVICE)
    losses = []
    tokens = sequences(n, length + 1, seed=0).to(DEVICE)
    for _ in range(steps):
        logits, _ = model(tokens[:, :-1], positions, attend(backend))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.fixture(scope="module")
def trained() -> tuple[Model, list[float]]:
    return train("auto", STEPS)


def test_it_learns_with_the_reference_forms(trained):
    losses = trained[1]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("backend", ("packed_sdpa", "masked_sdpa"))
def test_every_reference_form_trains_alike(trained, backend):
    assert train(backend, 5)[1] == pytest.approx(trained[1][:5], rel=1e-3)


def test_the_kernel_trains_as_masked_sdpa_does():
    """Twenty steps from one seed: each loss within 1 %. In the interpreter six, of one sequence of two blocks."""
    steps, size = (20, {}) if ON_GPU else (6, {"n": 1, "length": 9})
    with_kernel, with_reference = (train(backend, steps, **size)[1] for backend in ("triton", "masked_sdpa"))
    assert with_kernel == pytest.approx(with_reference, rel=1e-2)
    assert with_kernel[-1] < 0.7 * with_kernel[0]


def assert_near(got, want):
    """Compare logits: within 2e-2 relative L2."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= 2e-2, f"{error:.1e}"


def generate(model, step, steps, dtype, growing):
    """Feed tokens one by one through `step`, and compare each step's logits with those of masked SDPA.

    Both attend to the same blocks, those that `step` selected: near a tie rounding alone would select others.
    """
    tokens = sequences(2, steps, seed=99).to(DEVICE)
    caches = [[Cache(2, dtype, DEVICE, growing) for _ in range(LAYERS)] for _ in range(2)]
    for t in range(steps):
        at = torch.tensor([t], device=DEVICE)
        logits, blocks = step(tokens[:, t : t + 1], at, caches[0])
        logits, blocks = logits.clone(), [x.clone() for x in blocks]
        want, _ = model(tokens[:, t : t + 1], at, attend("masked_sdpa"), caches[1], blocks)
        assert_near(logits, want)


@torch.no_grad()
def test_eager_generation_with_a_growing_cache(trained):
    """In bf16 autocast on a GPU, in fp32 in the interpreter."""
    model = trained[0]
    low = torch.bfloat16 if ON_GPU else torch.float32
    triton = attend("triton", max_len=MAX_LEN)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=ON_GPU):
        generate(model, lambda *x: model(*x[:2], triton, x[2]), LENGTH if ON_GPU else 20, low, growing=True)


@needs_gpu
@pytest.mark.filterwarnings("default")  # torch's compiler warns of itself: of what it imports, of TF32, of its choices
@torch.no_grad()
def test_generation_under_reduce_overhead_with_a_cache_of_fixed_size(trained):
    """The ranges grow and the cache does not; max_len is a fixed bound."""
    model = trained[0]
    triton = attend("triton", max_len=MAX_LEN)
    torch._dynamo.reset()
    compiled = torch.compile(lambda tokens, at, caches: model(tokens, at, triton, caches), mode="reduce-overhead")

    def step(*x):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*x)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        generate(model, step, LENGTH, torch.bfloat16, growing=False)


@torch.no_grad()
def test_a_prompt_and_its_tokens_one_by_one_give_the_same_logits(trained):
    model = trained[0]
    tokens = sequences(2, 24, seed=5).to(DEVICE)
    whole, blocks = model(tokens, torch.arange(24, device=DEVICE), attend("packed_sdpa"))
    caches = [Cache(2, torch.float32, DEVICE, growing=True) for _ in range(LAYERS)]
    for t in range(24):
        given = [x[:, t : t + 1] for x in blocks]
        one, _ = model(
            tokens[:, t : t + 1], torch.tensor([t], device=DEVICE), attend("triton", max_len=MAX_LEN), caches, given
        )
        torch.testing.assert_close(one[:, 0], whole[:, t], atol=1e-3, rtol=1e-3)
