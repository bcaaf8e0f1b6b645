"""The examples of docs/serving.md, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel import reference, spans

PAGE = Path(__file__).parents[2] / "docs/serving.md"
GROWING, PAGED, PAGE_BY_PAGE, GRAPH = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
B, S, G, H, D, t = 2, 2, 2, 4, 16, 50
block_size, page_size, n_blocks = 16, 8, 3


@pytest.fixture
def names() -> dict:
    """Return what the examples take for granted: two sequences with 50 tokens each, in one piece and in pages."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q = torch.randn(B, S, G, H, D, device=device)
    whole = torch.randn(2, B, G, 64, D, device=device)
    table = torch.randperm(16, device=device).view(B, 8)
    cache = torch.empty(16, 2, page_size, G, D, device=device)
    cache[table] = whole.unflatten(3, (8, page_size)).permute(1, 3, 0, 4, 2, 5)
    context = (torch.full((B, 1), t, device=device) - S + 1 + torch.arange(S, device=device)).view(B, S, 1, 1)
    blocks = torch.tensor([3, 0, 1], device=device).expand(B, S, G, n_blocks)
    return {
        **{"torch": torch, "nsa_sel": nsa_sel, "spans": spans, "q": q, "B": B, "t": t, "blocks": blocks},
        **{"block_size": block_size, "page_size": page_size, "n_blocks": n_blocks, "context": context},
        **{"cache": cache, "block_table": table, "cache_k": whole[0], "cache_v": whole[1]},
        "ranges": spans.block_ranges(blocks, block_size, context),
    }


def test_a_context_that_grows(names):
    want = reference.oracle(names["q"], names["cache_k"], names["cache_v"], names["ranges"])
    exec(GROWING, names)
    torch.testing.assert_close(names["out"].double(), want, rtol=0, atol=1e-5)


def test_pages_of_both_kinds_and_layouts(names):
    want = reference.oracle(names["q"], names["cache_k"], names["cache_v"], names["ranges"])
    names |= {"cache_k": names["cache"][:, 0].contiguous(), "cache_v": names["cache"][:, 1].contiguous()}
    exec(PAGED, names)
    torch.testing.assert_close(names["out"].double(), want, rtol=0, atol=1e-5)
    exec(PAGE_BY_PAGE, names)
    found = reference.oracle(names["q"], names["k"], names["v"], names["ranges"])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    names |= {name: names[name].transpose(1, 2).contiguous() for name in ("cache_k", "cache_v")}
    exec(PAGED.replace("NHD", "HND"), names)
    torch.testing.assert_close(names["out"].double(), want, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_whose_tables_change(names):
    k, v = names["cache"][:, 0].contiguous(), names["cache"][:, 1].contiguous()
    names |= {"k": spans.paged_view(k, B), "v": spans.paged_view(v, B)}
    exec(GRAPH.replace("42", "int(block_table[1, 7])"), names)
    torch.cuda.synchronize()
    torch.testing.assert_close(names["out"], names["step"](), rtol=0, atol=1e-5)
