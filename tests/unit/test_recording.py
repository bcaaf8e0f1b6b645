"""Calls recorded from a model: what is written, how many, and what is refused, when recording and when loading."""

import multiprocessing
import re
import warnings

import pytest
import torch

import nsa_sel
from nsa_sel import config, recording
from nsa_sel.recording import RecordingError, load

B, S, G, H, D, Dv, S_KV = 1, 3, 2, 4, 16, 32, 40


def call(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return q, k, v and ranges of a small call."""
    torch.manual_seed(seed)
    shapes = (B, S, G, H, D), (B, G, S_KV, D), (B, G, S_KV, Dv)
    ranges = torch.tensor([[0, 5], [8, 40]], dtype=torch.int32).expand(B, S, G, 2, 2)
    return [*(torch.randn(shape).to(dtype) for shape in shapes), ranges]


@pytest.fixture
def limit(monkeypatch):
    """Set how many calls a folder holds."""

    def set_limit(count: int) -> None:
        monkeypatch.setattr(config, "_cached", nsa_sel.SelConfig(sel_record=count))

    return set_limit


def test_a_recorded_call_comes_back_bit_by_bit_whatever_its_strides(tmp_path):
    q, k, v, ranges = call()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    path = nsa_sel.record(tmp_path / "new" / "folder", q, k[:, :, ::2], v[:, :, ::2], ranges, scale=0.25)
    assert path == tmp_path / "new" / "folder" / "0001.pt"
    found = load(path)
    for name, given in {"q": q, "k": k[:, :, ::2], "v": v[:, :, ::2], "ranges": ranges}.items():
        kept = getattr(found, name)
        assert kept.dtype == given.dtype and torch.equal(kept, given)
    assert (found.S_kv, found.H, found.D, found.Dv, found.dtype, found.scale) == (20, H, D, Dv, "bfloat16", 0.25)


def test_without_tensors_only_ranges_and_shapes_are_kept(tmp_path):
    found = load(nsa_sel.record(tmp_path, *call(), tensors=False))
    assert found.q is found.k is found.v is None
    assert (found.S_kv, found.H, found.D, found.Dv, found.scale) == (S_KV, H, D, Dv, None)


def test_a_file_of_a_view_is_no_larger_than_the_view(tmp_path):
    q, k, v, ranges = call()
    large = torch.zeros(1000, *k.shape, dtype=k.dtype)
    path = nsa_sel.record(tmp_path, q, large[0], v, ranges)
    assert path.stat().st_size < large.nbytes / 10


def test_files_are_numbered_and_end_at_the_limit_with_one_warning(tmp_path, limit):
    limit(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for seed in range(6):
            nsa_sel.record(tmp_path, *call(seed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001.pt", "0002.pt", "0003.pt"]
    assert [torch.equal(load(tmp_path / f"000{n + 1}.pt").q, call(n)[0]) for n in range(3)] == [True] * 3
    assert [str(each.message).split(": ", 1)[1] for each in caught] == [
        f"{tmp_path} holds 3 calls, as many as NSA_SEL_RECORD says; no more are recorded"
    ]


def test_a_limit_of_zero_records_nothing_and_says_nothing(tmp_path, limit):
    limit(0)
    assert nsa_sel.record(tmp_path, *call()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_lies_there_is_not_overwritten(tmp_path):
    (tmp_path / "0001.pt").write_text("mine")
    assert nsa_sel.record(tmp_path, *call()).name == "0002.pt"
    assert (tmp_path / "0001.pt").read_text() == "mine"


def _record_six(folder, start):
    start.wait()
    for seed in range(6):
        nsa_sel.record(folder, *call(seed))


def test_processes_that_record_to_one_folder_share_its_numbers(tmp_path):
    # A fork of a process that uses CUDA cannot.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    start = context.Event()
    processes = [context.Process(target=_record_six, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:04}.pt" for n in range(1, 13)]
    for path in tmp_path.iterdir():
        load(path)


def test_what_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        nsa_sel.record(tmp_path, *call())
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named_and_nothing_is_written(tmp_path):
    q, k, v, ranges = call()
    with pytest.raises(ValueError, match=re.escape("v: shape is (1, 2, 39, 32), expected (1, 2, 40, 32)")):
        nsa_sel.record(tmp_path / "none", q, k, v[:, :, :39], ranges)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_under_torch_compile_it_is_refused_by_name(tmp_path, fullgraph):
    def model(q, k, v, ranges):
        nsa_sel.record(tmp_path, q, k, v, ranges)
        return q + 1

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="nsa_sel.record: cannot run under torch.compile"):
        torch.compile(model, fullgraph=fullgraph, backend="eager")(*call())
    assert list(tmp_path.iterdir()) == []


def test_under_capture_it_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(nsa_sel.UnsupportedError, match="nsa_sel.record: cannot run while a CUDA graph is captured"):
        nsa_sel.record(tmp_path, *call())
    assert list(tmp_path.iterdir()) == []


BAD_CONTENT = [
    ({"extra": 1}, "holds unknown key 'extra', expected the keys ranges, S_kv, H, D, Dv, dtype, scale, q, k, v"),
    ({"H": 0}, "H: value is 0, expected a whole number"),
    ({"D": 15}, "q: is torch.bfloat16 (1, 3, 2, 4, 16), expected torch.bfloat16 (1, 3, 2, 4, 15)"),
    ({"dtype": "float8"}, "dtype: value is 'float8', expected one of float16, bfloat16, float32"),
    ({"dtype": "float16"}, "q: is torch.bfloat16 (1, 3, 2, 4, 16), expected torch.float16 (1, 3, 2, 4, 16)"),
    ({"scale": float("nan")}, "scale: value is nan, expected a finite number or None"),
    ({"k": None}, "holds q and v, expected q, k and v together or none of them"),
    ({"k": 3}, "k: is int, expected torch.bfloat16 (1, 2, 40, 16)"),
    ({"ranges": torch.zeros(1, 3, 2, 2)}, "ranges: expected a tensor [B, S, G, n_spans, 2]"),
    ({"ranges": torch.zeros(1, 3, 2, 2, 2)}, "ranges: dtype is torch.float32, expected torch.int32 or torch.int64"),
    ({"ranges": torch.zeros(1, 3, 2, 2, 3).int()}, "ranges: shape is (1, 3, 2, 2, 3), expected (1, 3, 2, 2, 2)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONTENT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, change, message):
    path = nsa_sel.record(tmp_path, *call())
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(RecordingError) as refused:
        load(path)
    assert str(refused.value) == f"{path}: {message}"


def test_a_key_that_is_missing_is_named(tmp_path):
    path = nsa_sel.record(tmp_path, *call())
    content = torch.load(path, weights_only=True)
    del content["S_kv"]
    torch.save(content, path)
    with pytest.raises(RecordingError, match="missing 1 required positional argument: 'S_kv'"):
        load(path)


def test_a_file_of_anything_else_is_refused_in_one_line(tmp_path):
    whole = nsa_sel.record(tmp_path, *call()).read_bytes()
    path = tmp_path / "bad.pt"
    for content in (b"", b"text\nand more", whole[:-300], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RecordingError, match=r"^[^\n]*bad.pt: is damaged, or no file of nsa_sel.record[^\n]*$"):
            load(path)
    torch.save([1], path)
    with pytest.raises(RecordingError, match="bad.pt: holds a list, expected the keys"):
        load(path)
    with pytest.raises(RecordingError, match="none.pt: cannot be read: No such file"):
        load(tmp_path / "none.pt")


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"ranges": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(RecordingError, match="is damaged, or no file of nsa_sel.record"):
        load(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def test_recording_is_public():
    assert nsa_sel.record is recording.record
