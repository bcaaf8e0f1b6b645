"""Bad input is named, with what came and what is allowed; empty input is valid."""

from __future__ import annotations

import pytest
import torch

from nsa_sel import SelConfig, choose_route, selection_attention

B, S, G, H, D, Dv, S_KV, N_SPANS = 2, 3, 2, 4, 32, 16, 20, 3
FORM = r"^{name}: (rank|shape|dtype|device|stride|value|type) is .+, expected .+"


def arguments() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, S, G, H, D),
        "k": torch.randn(B, G, S_KV, D),
        "v": torch.randn(B, G, S_KV, Dv),
        "ranges": torch.tensor([2, 9]).expand(B, S, G, N_SPANS, 2).contiguous(),
    }


BAD = [
    # argument, how it is spoilt, the error, words that the message must hold
    ("q", lambda t: t[0], ValueError, "rank is 4, expected 5"),
    ("k", lambda t: t[0], ValueError, "rank is 3, expected 4"),
    ("v", lambda t: t[None], ValueError, "rank is 5, expected 4"),
    ("ranges", lambda t: t[..., 0], ValueError, "rank is 4, expected 5"),
    ("q", lambda t: t.double(), TypeError, "dtype is torch.float64, expected"),
    ("q", lambda t: t.int(), TypeError, "dtype is torch.int32, expected"),
    ("k", lambda t: t.half(), TypeError, "dtype is torch.float16, expected torch.float32 as q"),
    ("v", lambda t: t.bfloat16(), TypeError, "dtype is torch.bfloat16, expected torch.float32 as q"),
    ("ranges", lambda t: t.float(), TypeError, "dtype is torch.float32, expected torch.int32 or torch.int64"),
    ("ranges", lambda t: t.short(), TypeError, "dtype is torch.int16, expected torch.int32 or torch.int64"),
    ("ranges", lambda t: t.bool(), TypeError, "dtype is torch.bool, expected torch.int32 or torch.int64"),
    ("k", lambda t: t.to("meta"), ValueError, "device is meta, expected cpu as q"),
    ("v", lambda t: t.to("meta"), ValueError, "device is meta, expected cpu as q"),
    ("ranges", lambda t: t.to("meta"), ValueError, "device is meta, expected cpu as q"),
    ("k", lambda t: t[..., :16], ValueError, "shape is (2, 2, 20, 16), expected (2, 2, 20, 32)"),
    ("k", lambda t: t[:1], ValueError, "shape is (1, 2, 20, 32), expected (2, 2, 20, 32)"),
    ("k", lambda t: t[:, :1], ValueError, "shape is (2, 1, 20, 32), expected (2, 2, 20, 32)"),
    ("v", lambda t: t[:, :, :19], ValueError, "shape is (2, 2, 19, 16), expected (2, 2, 20, 16)"),
    ("v", lambda t: t[:, :1], ValueError, "shape is (2, 1, 20, 16), expected (2, 2, 20, 16)"),
    ("ranges", lambda t: t[:, :1], ValueError, "shape is (2, 1, 2, 3, 2), expected (2, 3, 2, 3, 2)"),
    ("ranges", lambda t: torch.cat((t, t), -1), ValueError, "shape is (2, 3, 2, 3, 4), expected (2, 3, 2, 3, 2)"),
    ("q", lambda t: t.mT.contiguous().mT, ValueError, "stride is"),
    ("k", lambda t: t.mT.contiguous().mT, ValueError, "stride is"),
    ("v", lambda t: torch.stack((t, t), -1)[..., 0], ValueError, "stride is"),
    ("ranges", lambda t: t.mT.contiguous().mT, ValueError, "stride is"),
    ("q", lambda t: t.tolist(), TypeError, "type is list, expected torch.Tensor"),
    ("ranges", lambda t: None, TypeError, "type is NoneType, expected torch.Tensor"),
]


@pytest.mark.parametrize("function", (selection_attention, choose_route))
@pytest.mark.parametrize(("name", "spoil", "error", "words"), BAD, ids=[f"{b[0]}-{b[3]}"[:40] for b in BAD])
def test_a_bad_tensor_is_named(function, name, spoil, error, words):
    good = arguments()
    function(**good)
    with pytest.raises(error, match=FORM.format(name=name)) as caught:
        function(**{**good, name: spoil(good[name])})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"backend": "cuda"}, "backend", "'cuda'"),
        ({"backend": None}, "backend", "None"),
        ({"min_len": -1}, "min_len", "-1"),
        ({"max_len": -3}, "max_len", "-3"),
        ({"min_len": 9, "max_len": 8}, "min_len", "9"),
    ],
)
def test_a_bad_option_is_named(options, name, words):
    with pytest.raises(ValueError, match=rf"^{name}: value is .*{words}.*, expected .+"):
        selection_attention(**arguments(), **options)


@pytest.mark.parametrize("backend", ("auto", "packed_sdpa", "masked_sdpa"))
def test_validate_names_the_bad_row_and_span(backend):
    good = arguments()
    good["ranges"][1, 2, 0, 1] = torch.tensor([3, S_KV + 1])
    assert selection_attention(**good, backend=backend, validate=False).isfinite().all()
    config = SelConfig.load(env={"NSA_SEL_VALIDATE": "1"})
    message = r"ranges: value is \[3, 21\) in row \(b=1, s=2, g=0\), span 1, expected"
    for options in ({"validate": True}, {"config": config}):
        with pytest.raises(ValueError, match=message):
            selection_attention(**good, backend=backend, **options)
    assert selection_attention(**good, backend=backend, config=config, validate=False).isfinite().all()


@pytest.mark.parametrize("hint", ({"min_len": 22}, {"max_len": 20}))
def test_validate_checks_the_hints(hint):
    with pytest.raises(ValueError, match=rf"^{next(iter(hint))}: value is .* row \(b=0, s=0, g=0\)"):
        selection_attention(**arguments(), validate=True, **hint)


@pytest.mark.parametrize("validate", (False, True))
@pytest.mark.parametrize("backend", ("auto", "packed_sdpa", "masked_sdpa"))
def test_no_spans_give_zeros(backend, validate):
    good = arguments()
    good["ranges"] = good["ranges"][..., :0, :]
    out = selection_attention(**good, backend=backend, validate=validate)
    assert out.shape == (B, S, G, H, Dv)
    assert out.dtype == good["q"].dtype
    assert (out == 0).all()


@pytest.mark.parametrize("validate", (False, True))
@pytest.mark.parametrize("backend", ("auto", "packed_sdpa", "masked_sdpa"))
def test_an_empty_context_gives_zeros(backend, validate):
    good = arguments()
    good["k"], good["v"] = good["k"][:, :, :0], good["v"][:, :, :0]
    good["ranges"] = torch.zeros_like(good["ranges"])
    out = selection_attention(**good, backend=backend, validate=validate)
    assert out.shape == (B, S, G, H, Dv)
    assert (out == 0).all()


@pytest.mark.parametrize("validate", (False, True))
@pytest.mark.parametrize("backend", ("auto", "packed_sdpa", "masked_sdpa"))
def test_an_empty_batch_gives_an_empty_tensor(backend, validate):
    good = arguments()
    nothing = {name: t[:0] for name, t in good.items()}
    assert selection_attention(**nothing, backend=backend, validate=validate).shape == (0, S, G, H, Dv)
    no_query = {**good, "q": good["q"][:, :0], "ranges": good["ranges"][:, :0]}
    assert selection_attention(**no_query, backend=backend, validate=validate).shape == (B, 0, G, H, Dv)


def test_a_single_column_may_have_any_stride():
    good = arguments()
    good["v"] = torch.randn(B, G, 1, S_KV).mT  # [B, G, S_KV, 1]
    assert selection_attention(**good).shape == (B, S, G, H, 1)
