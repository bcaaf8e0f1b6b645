"""The tuned table: which calls find an entry, where tables are read from, and what makes one unusable."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_sel.kernel import tuned_table
from nsa_sel.kernel.call import Call, Gpu
from nsa_sel.kernel.launch_config import LaunchConfig
from nsa_sel.kernel.tuned_table import Entry, Key, Table, TableError

GPU = "NVIDIA H200"
H200 = Gpu(GPU, 132, 227 * 1024, has_tma=True, has_clusters=False)
CALL = Call(N=1024, H=8, D=128, Dv=128, n_spans=8, max_len=512, one_length=True)
TUNED = LaunchConfig("gather", 64, 128, 64, 2, 3, 4, 168)
TMA = replace(TUNED, load="tma")
MEASURED = {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1", "cuda": "13.0", "date": "2026-01-01"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Give the local and the packaged folder of tables, both empty."""
    local, packaged = tmp_path / "local", tmp_path / "packaged"
    for name, folder in (("LOCAL", local), ("PACKAGED", packaged)):
        folder.mkdir()
        monkeypatch.setattr(tuned_table, name, folder)
    tuned_table.forget()
    yield local, packaged
    tuned_table.forget()


def table(launch=TUNED, **call):
    return Table(GPU, MEASURED, {Key.of(replace(CALL, **call), H200): Entry(launch, {"us": {"a case": 35.4}})})


def write(folder, tuned):
    path = folder / tuned_table.file_name(GPU)
    path.write_text(tuned.as_json())
    return path


def lookup(gpu=H200, **call):
    return tuned_table.lookup(replace(CALL, **call), gpu)


def test_rows_of_one_span_and_several_lengths_have_no_entry(folders):
    write(folders[1], table(n_spans=1))
    assert lookup(n_spans=1) == TUNED
    assert lookup(n_spans=1, one_length=False) is None
    write(folders[1], table(n_spans=8))
    tuned_table.forget()
    assert lookup(n_spans=8, one_length=False) == TUNED


def test_without_a_table_nothing_is_found_and_nothing_is_said(folders, recwarn):
    assert lookup() is None
    assert not recwarn


def test_a_written_table_is_read_as_it_was(folders):
    path = write(folders[1], table())
    assert path.name == "NVIDIA_H200.json"
    assert tuned_table.read(path, GPU) == table()
    assert lookup() == TUNED


@pytest.mark.parametrize(
    "call",
    [
        {"max_len": 363},  # 512 / sqrt(2) is 362.04
        {"max_len": 724},
        {"H": 1},
        {"H": 16},  # padded to the same 16
        {"N": 747},  # from 5.66 rows a multiprocessor on, the GPU is full
        {"N": 100_000},
        {"n_spans": 6},
    ],
)
def test_calls_of_the_same_kind_find_the_entry(folders, call):
    write(folders[1], table())
    assert lookup(**call) == TUNED


@pytest.mark.parametrize(
    "call",
    [
        {"max_len": 362},
        {"max_len": 725},
        {"max_len": 0},
        {"N": 0},
        {"N": 746},
        {"n_spans": 1},
        {"n_spans": 0},
        {"n_spans": 32},
        {"H": 17},
        {"D": 64},
        {"Dv": 64},
        {"D": 192},
        {"element_bytes": 4},
        {"shared_kv": True},
    ],
)
def test_calls_of_another_kind_are_left_to_the_model(folders, call):
    write(folders[1], table())
    assert lookup() == TUNED
    assert lookup(**call) is None


@pytest.mark.parametrize(("sm_count", "found"), ((114, True), (256, False)))
def test_rows_are_counted_by_multiprocessor(folders, sm_count, found):
    write(folders[1], table())
    assert (lookup(gpu=replace(H200, sm_count=sm_count)) == TUNED) is found


def test_one_long_span_is_a_kind_of_its_own_and_long_spans_are_alike(folders):
    write(folders[1], table(max_len=1024, n_spans=4))  # 256 tokens each
    assert lookup(max_len=1024, n_spans=2) == TUNED
    assert lookup(max_len=1024, n_spans=1) is None


def test_a_launch_with_tma_is_only_for_tensors_that_fit_it(folders):
    write(folders[1], table(TMA))
    assert lookup() == TMA
    assert lookup(fits_tma=False) is None


def test_a_launch_with_clusters_is_only_for_gpus_that_have_them(folders):
    launch = replace(TUNED, cluster=2)
    write(folders[1], table(launch))
    assert lookup() is None
    assert lookup(gpu=replace(H200, has_clusters=True)) == launch


def test_another_gpu_finds_nothing(folders):
    write(folders[1], table())
    assert lookup(gpu=replace(H200, name="NVIDIA H200 NVL")) is None


def test_the_working_directory_comes_before_the_package(folders):
    local, packaged = folders
    write(packaged, table())
    write(local, table(TMA))
    assert lookup() == TMA


def test_a_table_can_be_ignored_for_a_while(folders):
    write(folders[1], table())
    with tuned_table.ignored():
        assert lookup() is None
    assert lookup() == TUNED


def damage(what):
    data = json.loads(table().as_json())
    entry = data["entries"][0]
    if what == "duplicate":
        data["entries"].append(entry)
    elif what in ("schema", "gpu", "kernel"):
        data[what] = "other"
    elif what == "missing field":
        del entry["launch"]["num_warps"]
    elif what == "zero":
        entry["launch"]["num_warps"] = 0
    else:
        name, value = what
        (entry["launch"] if name in entry["launch"] else entry["key"])[name] = value
    return json.dumps(data)


DAMAGED = {
    "schema": damage("schema"),
    "gpu": damage("gpu"),
    "kernel": damage("kernel"),
    "truncated": table().as_json()[:-20],
    "empty": "",
    "a list": "[]",
    "no entries": json.dumps({k: v for k, v in json.loads(table().as_json()).items() if k != "entries"}),
    "a key twice": damage("duplicate"),
    "a missing field": damage("missing field"),
    "zero warps": damage("zero"),
    "an unknown field": damage(("num_ctas", 2)),
    "a number as text": damage(("num_warps", "4")),
    "a flag as a number": damage(("num_warps", True)),
    "a fraction": damage(("length", 6.5)),
    "clusters that the parts do not fill": damage(("cluster", 3)),
    "no cluster": damage(("cluster", 0)),
    "more column chunks of D than the kernel holds": damage(("block_d", 16)),
    "more column chunks of Dv than the kernel holds": damage(("block_dv", 16)),
    "tiles of no power of two": damage(("block_l", 48)),
    "a load that does not exist": damage(("load", "stream")),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_table_that_cannot_be_used_gives_one_warning_that_says_how_to_retune(folders, what):
    path = folders[1] / tuned_table.file_name(GPU)
    path.write_text(DAMAGED[what])
    with pytest.raises(TableError, match="nsa-sel tune"):
        tuned_table.read(path, GPU)
    with pytest.warns(RuntimeWarning) as caught:
        assert lookup() is None
        assert lookup(max_len=64) is None
    (warning,) = caught
    text = str(warning.message)
    assert str(path) in text and "nsa-sel tune" in text and "\n" not in text


def test_a_stale_table_here_does_not_hide_the_packaged_one(folders):
    local, packaged = folders
    (local / tuned_table.file_name(GPU)).write_text(DAMAGED["kernel"])
    write(packaged, table())
    with pytest.warns(RuntimeWarning, match="kernel is 'other'"):
        assert lookup() == TUNED


def test_tables_are_read_again_when_told_so(folders):
    assert lookup() is None
    write(folders[1], table())
    assert lookup() is None
    tuned_table.forget()
    assert lookup() == TUNED


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA_GeForce_RTX_4090.json"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB.json"),
        ("../x/y", ".._x_y.json"),
    ],
)
def test_file_names(gpu, name):
    assert tuned_table.file_name(gpu) == name


HASHED = """
import triton
import triton.language as tl

LN_2 = tl.constexpr(0.69)
{more}
@triton.jit
def _step(x):
    return x * LN_2

@triton.jit
def _sel_fwd(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, _step(tl.load(x_ptr)))
"""
MOVED = """
import triton
import triton.language as tl

@triton.jit
def _sel_fwd(x_ptr, BLOCK: tl.constexpr):
    \"\"\"Say what it does.\"\"\"
    tl.store(x_ptr, _step(tl.load(x_ptr)))  # and why

@triton.jit
def _step(x):
    # A sentence.
    return x * LN_2

LN_2 = tl.constexpr(0.69)
"""
BESIDE = "@triton.jit\ndef _other_fwd(x):\n    return _step(x)\n\nUNREAD = 1"


@pytest.mark.parametrize(
    ("source", "same"),
    [
        (MOVED, True),
        (HASHED.format(more=BESIDE), True),
        (HASHED.format(more="").replace("0.69", "0.7"), False),
        (HASHED.format(more="").replace("x * LN_2", "x + LN_2"), False),
        (HASHED.format(more="").replace("BLOCK: tl.constexpr", "BLOCK"), False),
    ],
    ids=["moved and explained", "another kernel beside it", "a constant", "an inner function", "the signature"],
)
def test_the_hash_changes_with_what_the_kernel_reaches_and_with_nothing_else(tmp_path, source, same):
    def code(text):
        (tmp_path / "device.py").write_text(text)
        return tuned_table._device_code("_sel_fwd", tmp_path)

    assert (code(source) == code(HASHED.format(more=""))) is same


def test_the_hash_reaches_every_part_of_the_kernel():
    found = "\n".join(tuned_table._device_code(tuned_table.KERNEL, Path(tuned_table.__file__).parent))
    for name in (
        "def _sel_fwd(",
        "def attend(",
        "def load_tile(",
        "def load_spans(",
        "def dot(",
        "LN_2 =",
        "INTERPRETED =",
    ):
        assert found.count(name) == 1, name


def test_names_of_device_code_stand_once():
    """By name alone the hash finds what a kernel calls."""
    folder = Path(tuned_table.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    names = [
        name
        for text in sources
        if "@triton.jit" in text
        for name in re.findall(r"^(?:def )?(\w+)(?:\(| =)", text, re.M)
    ]
    assert len(names) == len(set(names)) > 10


@pytest.mark.parametrize("path", sorted(tuned_table.PACKAGED.glob("*.json")), ids=lambda path: path.name)
def test_a_table_in_the_tree_can_be_used(path):
    # After a change of the kernel: run nsa-sel tune on that GPU, or delete the table, which nobody reads any more.
    gpu = json.loads(path.read_text())["gpu"]
    assert path.name == tuned_table.file_name(gpu)
    tuned_table.read(path, gpu)
