"""Every routing rule, its order, and its one sentence."""

import pytest

from nsa_sel.config import PACKAGED_FILE, SelConfig
from nsa_sel.errors import UnsupportedError
from nsa_sel.routing import Route, decide

MEASURED = {"default": 64, "Measured": 32, "Slow": None}


TRAINS = {"sel_triton_min_L": {"Measured": {"inference": 32, "training": 128}}}
TRANSFORMED = {"needs_grad": True, "transformed": True}
OF_CALL = {"gpu_name": "Measured", "max_len": 512, "needs_grad": False, "unsupported": None, "transformed": False}


def route(backend="auto", **given):
    of_call = {name: given.pop(name, default) for name, default in OF_CALL.items()}
    return decide(backend, config=SelConfig(**{"sel_triton_min_L": MEASURED, **given}), **of_call)


def never_called():
    raise AssertionError("the length was asked for where it does not matter")


def unreadable():
    raise UnsupportedError("max_len: the ranges cannot be read")


def test_auto_chooses_triton_on_a_measured_gpu():
    assert route() == Route("triton", "L=512 is at least sel_triton_min_L=32")


@pytest.mark.parametrize(
    ("length", "backend"), [(31, "packed_sdpa"), (32, "triton"), (33, "triton"), (0, "packed_sdpa")]
)
def test_the_threshold_is_inclusive(length, backend):
    assert route(max_len=length).backend == backend


def test_a_short_row_is_below_the_threshold_of_its_gpu():
    assert route(max_len=31).reason == "L=31 is below sel_triton_min_L=32"
    assert route(gpu_name="Other", max_len=48, use_triton_sel=True).reason == "L=48 is below sel_triton_min_L=64"


@pytest.mark.parametrize("call", [{}, {"needs_grad": True, **TRAINS}])
def test_a_length_that_cannot_be_read_leaves_auto_with_sdpa(call):
    assert route(max_len=unreadable, **call) == Route("packed_sdpa", "max_len: the ranges cannot be read")
    assert route(max_len=unreadable, use_sel_pack=False, **call).backend == "masked_sdpa"


def test_auto_keeps_away_from_a_gpu_that_was_not_measured():
    assert route(gpu_name="Other", max_len=never_called) == Route(
        "packed_sdpa", "NSA_USE_TRITON_SEL is auto and sel_triton_min_L has no measured entry for Other"
    )


def test_one_integer_for_every_gpu_is_no_measurement():
    assert route(sel_triton_min_L=16, max_len=never_called).backend == "packed_sdpa"
    assert route(sel_triton_min_L=16, use_triton_sel=True).backend == "triton"


def test_switched_on_uses_any_gpu_that_can():
    assert route(gpu_name="Other", use_triton_sel=True).backend == "triton"


def test_switched_on_does_not_override_never():
    for toggle in ("auto", True):
        assert route(gpu_name="Slow", use_triton_sel=toggle, max_len=never_called) == Route(
            "packed_sdpa", "sel_triton_min_L is null (never) for Slow"
        )


def test_switched_off_never_uses_triton():
    assert route(use_triton_sel=False, max_len=never_called) == Route(
        "packed_sdpa", "NSA_USE_TRITON_SEL is 0 (set by call argument)"
    )


@pytest.mark.parametrize("toggle", ["auto", True])
def test_obstacles_stop_auto_before_the_length_is_asked_for(toggle):
    stopped = {"use_triton_sel": toggle, "max_len": never_called}
    assert route(gpu_name=None, **stopped) == Route("packed_sdpa", "no CUDA device")
    assert route(unsupported="q: H is 65, expected at most 64", **stopped) == Route(
        "packed_sdpa", "q: H is 65, expected at most 64"
    )
    assert route(needs_grad=True, **stopped) == Route(
        "packed_sdpa", "gradients needed, and sel_triton_min_L has no training length for Measured"
    )
    assert route(**TRANSFORMED, **TRAINS, **stopped).reason.startswith("gradients needed under torch.func")


def test_calls_that_need_a_gradient_have_a_threshold_of_their_own():
    assert route(needs_grad=True, max_len=128, **TRAINS) == Route(
        "triton", "L=128 is at least sel_triton_min_L=128 for training"
    )
    assert route(needs_grad=True, max_len=127, **TRAINS) == Route(
        "packed_sdpa", "L=127 is below sel_triton_min_L=128 for training"
    )
    assert route(max_len=32, **TRAINS).reason == "L=32 is at least sel_triton_min_L=32"


def test_of_the_shipped_configuration_an_h200_alone_trains_with_the_kernel_from_the_one_length_that_was_measured():
    shipped = SelConfig.load(PACKAGED_FILE, env={})
    trains = {name: shipped.min_len_for(name, training=True) for name in shipped.sel_triton_min_L}
    assert {name: length for name, length in trains.items() if length is not None} == {"NVIDIA H200": 1024}


def test_a_call_without_a_gpu_that_needs_gradients_under_a_transform_says_so():
    assert route(gpu_name=None, **TRANSFORMED).reason.startswith("gradients needed under torch.func")


@pytest.mark.parametrize(
    "obstacle", [{"needs_grad": True}, TRANSFORMED, {"gpu_name": None}, {"max_len": 1}, {"use_triton_sel": False}]
)
def test_every_fallback_is_masked_sdpa_without_packing(obstacle):
    assert route(use_sel_pack=False, **obstacle).backend == "masked_sdpa"
    assert route(use_sel_pack=True, **obstacle).backend == "packed_sdpa"


def test_use_sel_pack_is_about_the_fallback_only():
    assert route(use_sel_pack=False).backend == "triton"


@pytest.mark.parametrize("toggles", [{}, {"use_sel_pack": False}, {"use_triton_sel": True}, {"use_triton_sel": False}])
def test_the_kill_switch_sends_auto_to_packed_sdpa(toggles):
    assert route(force_parity=True, max_len=never_called, **toggles) == Route(
        "packed_sdpa", "NSA_FORCE_PARITY is on (set by call argument)"
    )


def test_the_kill_switch_stops_triton_asked_for_by_name():
    with pytest.raises(UnsupportedError, match="NSA_FORCE_PARITY is on"):
        route("triton", force_parity=True)


def test_a_reason_names_the_layer_that_set_the_toggle():
    config = SelConfig(force_parity=True, sources={"force_parity": "environment NSA_FORCE_PARITY"})
    decided = decide("auto", config=config, gpu_name=None, max_len=1, needs_grad=False, unsupported=None)
    assert decided.reason == "NSA_FORCE_PARITY is on (set by environment NSA_FORCE_PARITY)"


@pytest.mark.parametrize("backend", ["triton", "packed_sdpa", "masked_sdpa"])
@pytest.mark.parametrize(
    "against", [{}, {"use_triton_sel": False}, {"gpu_name": None}, {"gpu_name": "Slow"}, {"needs_grad": True}]
)
def test_a_backend_asked_for_by_name_runs_whatever_auto_would_do(backend, against):
    assert route(backend, max_len=never_called, use_sel_pack=False, **against) == Route(
        backend, f"backend='{backend}' was asked for"
    )


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (TRANSFORMED, "gradients needed under torch.func"),
        ({"unsupported": "no GPU and no interpreter"}, "no GPU and no interp"),
    ],
)
def test_triton_asked_for_by_name_never_falls_back(obstacle, reason):
    with pytest.raises(UnsupportedError, match=f"^backend: value is 'triton', which cannot run this call: {reason}"):
        route("triton", **obstacle)


@pytest.mark.parametrize("backend", ["packed_sdpa", "masked_sdpa"])
@pytest.mark.parametrize("obstacle", [TRANSFORMED, {"unsupported": "anything"}, {"force_parity": True}])
def test_the_references_run_where_the_kernel_cannot(backend, obstacle):
    assert route(backend, **obstacle).backend == backend


@pytest.mark.parametrize("backend", ["", "Triton", "sdpa", None, 1])
def test_an_unknown_backend_names_the_known_ones(backend):
    with pytest.raises(ValueError) as caught:
        route(backend)
    expected = "expected one of 'auto', 'triton', 'packed_sdpa', 'masked_sdpa'"
    assert str(caught.value) == f"backend: value is {backend!r}, {expected}"
