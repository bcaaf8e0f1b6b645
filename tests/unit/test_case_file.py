"""Cases of one's own: the file, its errors, recorded calls as cases, and what a saved run keeps of them."""

import json
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel import reference, spans
from nsa_sel.bench.saved.figures import RunError
from nsa_sel.bench.suite import cases
from nsa_sel.bench.suite.case_file import CaseFileError, read
from nsa_sel.bench.suite.inputs import make_inputs, make_ranges, memory_estimate, traffic
from nsa_sel.bench.suite.saved_cases import definitions, known, rebuilt
from nsa_sel.recording import RecordingError

ROWS = "{family: rows, distribution: few, H: 4, D: 64, Dv: 64, L: 64, N: 8}"
DECODE = "{family: decode, distribution: random, H: 4, D: 64, Dv: 64, L: 128, batch: 2, context: 512}"
PREFILL = "{family: prefill, distribution: local, H: 4, D: 64, Dv: 64, L: 256, S: 512, G: 2}"
EXAMPLES = Path(__file__).parents[2] / "examples/cases.yaml"


@pytest.fixture
def file(tmp_path):
    """Write a file whose cases are these entries, one a line from the second on, and return its path."""

    def write(*entries: str) -> Path:
        path = tmp_path / "cases.yaml"
        path.write_text("cases:\n" + "".join(f"  - {entry}\n" for entry in entries), encoding="utf-8")
        return path

    return write


def ids(path: Path) -> list[str]:
    return [case.id for case in read(path)]


# --- what a file says ---


def test_a_case_that_a_matrix_has_is_that_case(file):
    path = file(
        "{family: rows, distribution: many, H: 8, D: 128, Dv: 128, L: 512, N: 1024}",
        "{family: ragged, H: 8, D: 128, Dv: 128, L: 256, N: 64}",
        "{family: prefill, distribution: many, H: 16, D: 192, Dv: 128, L: 1024, S: 4096, G: 4}",
    )
    by_id = {case.id: case for case in cases.matrix("full")}
    found = read(path)
    assert [by_id[case.id] for case in found] == found
    assert found[0].id == "rows-bf16-H8-D128-Dv128-L512-N1024-many"


def test_lists_make_products_in_the_order_of_the_keys(file):
    path = file("{family: rows, distribution: [few, many], H: 4, D: 64, Dv: 64, L: [64, 128], N: 8}")
    assert ids(path) == [
        "rows-bf16-H4-D64-Dv64-L64-N8-few",
        "rows-bf16-H4-D64-Dv64-L128-N8-few",
        "rows-bf16-H4-D64-Dv64-L64-N8-many",
        "rows-bf16-H4-D64-Dv64-L128-N8-many",
    ]


def test_what_the_matrix_never_varies_is_in_the_id(file):
    path = file(
        DECODE,
        DECODE.replace("context", "G: 8, block: 32, name: mine, context"),
        PREFILL,
        PREFILL.replace("S:", "N: 2048, block: 16, S:"),
        ROWS.replace("N:", "name: mine, N:"),
    )
    assert ids(path) == [
        "decode-bf16-H4-D64-Dv64-L128-N8-t512-random",
        "decode-bf16-H4-D64-Dv64-L128-N16-t512-G8-block32-random-mine",
        "prefill-bf16-H4-D64-Dv64-L256-N1024-S512-local",
        "prefill-bf16-H4-D64-Dv64-L256-N2048-S512-G2-block16-local",
        "rows-bf16-H4-D64-Dv64-L64-N8-few-mine",
    ]


def test_the_dtype_is_the_options_unless_the_entry_names_one(file):
    path = file(ROWS, ROWS.replace("N:", "dtype: bf16, N:"))
    assert [case.dtype for case in read(path, "fp16")] == ["fp16", "bf16"]
    with pytest.raises(CaseFileError, match="is in line 2 already"):
        read(path, "bf16")


def test_a_prefill_case_of_several_sequences_and_small_blocks_selects_what_it_says(file):
    (case,) = read(file(PREFILL.replace("S:", "N: 2048, block: 16, S:")))
    ranges = make_ranges(case)
    assert tuple(ranges.shape) == (2, 512, 2, 16, 2)
    assert (ranges[..., 1] - ranges[..., 0]).max() == 16
    assert spans.lengths(ranges, case.S_kv).max() == 256


def test_the_example_is_read_and_its_models_are_those_that_it_names():
    found = read(EXAMPLES)
    assert {case.name for case in found} == {"nsa-27b", "minicpm4.1-8b", "seerattention-r-qwen3"}
    assert {(c.H, c.D, c.Dv, c.n_spans, c.block) for c in found if c.name == "nsa-27b"} == {(16, 192, 128, 16, 64)}


# --- errors: the line, the key, what it is and what is expected ---

BAD_ENTRIES = {
    ROWS.replace("L: 64", "L: 6x4"): "L: value is '6x4', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: 0"): "L: value is '0', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: -8"): "L: value is '-8', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: 64.0"): "L: value is '64.0', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: 0x40"): "L: value is '0x40', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: 1:30"): "L: value is '1:30', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: true"): "L: value is 'true', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: '64'"): "L: value is '64', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L:"): "L: value is '', expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: {}"): "L: value is a mapping, expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: [[64]]"): "L: value is a list, expected a whole number of at least 1",
    ROWS.replace("L: 64", "L: []"): "L: is an empty list, expected a value or several",
    ROWS.replace("L: 64", "L: [64, 64]"): "L: value 64 is in the list twice",
    ROWS.replace("L: 64", "L: 64, L: 32"): "L: is given twice, first in line 2",
    ROWS.replace("L: 64, ", ""): "L: is missing, rows needs it",
    ROWS.replace("L: 64", "l: 64"): "key is 'l', expected one of distribution, H, D, Dv, L, N, dtype, name for rows",
    ROWS.replace("few", "[few, none]"): "distribution: value is 'none', expected a distribution: ",
    ROWS.replace("few", "zipf"): "distribution: value is 'zipf', expected a distribution of spans: ",
    ROWS.replace("few", "7"): "distribution: value is '7', expected a word",
    ROWS.replace("few, ", "many, ").replace("64, N", "60, N"): "L: value is 60, expected a multiple of 8 for many",
    ROWS.replace("N:", "dtype: fp32, N:"): "dtype: value is 'fp32', expected one of bf16, fp16",
    ROWS.replace("N:", "name: a b, N:"): "name: value is 'a b', expected letters, digits, _, - and .",
    ROWS.replace("rows", "row"): "family: value is 'row', expected one of rows, ragged, decode, prefill",
    ROWS.replace("rows", "ragged"): "distribution: value is 'few', expected ragged for the family ragged",
    ROWS.replace("family: rows, ", ""): "family: is missing; so is recorded, of which a case has one",
    ROWS.replace("rows", "[rows, decode]"): "batch: is missing, decode needs it",
    DECODE.replace("128", "100"): "L: value is 100, expected a multiple of 64 up to the 512 tokens of context",
    DECODE.replace("128", "1024"): "L: value is 1024, expected a multiple of 64 up to the 512 tokens of context",
    DECODE.replace("512", "500"): "context: value is 500, expected a multiple of the block of 64",
    DECODE.replace("batch", "N: 9, batch"): "N: value is 9, expected 8, the batch times 4 groups; N can be left out",
    DECODE.replace("random", "local"): "L: value is 128, expected at least 3 blocks of 64 for local",
    PREFILL.replace("512", "500"): "S: value is 500, expected a multiple of the block of 64",
    PREFILL.replace("S:", "N: 9, S:"): "N: value is 9, expected a multiple of S times G, which is 1024; N can be left",
    PREFILL.replace("S:", "context: 9, S:"): "key is 'context', expected one of distribution, H, D, Dv, L, S, G, block",
    "{recorded: none/*.pt}": "recorded: nothing matches 'none/*.pt' in ",
    "{recorded: []}": "recorded: is an empty list, expected a value or several",
    "{recorded: x.pt, H: 4}": "key is 'H', expected one of recorded, name for recorded",
    "{recorded: x.pt, family: rows}": "key is 'recorded', expected one of distribution, ",
    "[1, 2]": "a case is a list, expected key: value",
    "rows": "a case is 'rows', expected key: value",
    "{[a]: 1}": "key is a list, expected a word",
}


@pytest.mark.parametrize(("entry", "message"), BAD_ENTRIES.items())
def test_a_bad_entry_is_one_line_that_names_line_and_key(file, entry, message):
    path = file(entry)
    with pytest.raises(CaseFileError) as refused:
        read(path)
    said = str(refused.value)
    assert said.startswith(f"{path} line 2: {message}") and "\n" not in said


def test_the_line_is_that_of_the_key_or_of_the_item(tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text(
        "cases:\n- family: rows\n  distribution: many\n  H: 4\n  D: 64\n  Dv: 64\n  L: [64,\n    60]\n  N: 8\n"
    )
    with pytest.raises(CaseFileError, match="cases.yaml line 8: L: value is 60"):
        read(path)
    path.write_text(path.read_text().replace("  N: 8", "  N: 6x4"))
    with pytest.raises(CaseFileError, match="cases.yaml line 9: N: value is '6x4'"):
        read(path)


def test_two_cases_of_one_id_are_refused_and_a_name_tells_them_apart(file):
    with pytest.raises(CaseFileError) as refused:
        read(file(DECODE, ROWS, DECODE))
    name = "decode-bf16-H4-D64-Dv64-L128-N8-t512-random"
    assert str(refused.value).endswith(f"cases.yaml line 4: case {name} is in line 2 already; give one a name")
    assert len(ids(file(DECODE, ROWS, DECODE.replace("batch", "name: again, batch")))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": ": is empty, expected cases:",
        "# only a comment": ": is empty, expected cases:",
        "cases:": " line 1: cases: expected a list of at least one case",
        "cases: []": " line 1: cases: expected a list of at least one case",
        "cases: {a: 1}": " line 1: cases: expected a list of at least one case",
        "- a": " line 1: the file is a list, expected key: value",
        "\ncases: []\nmore: 1": " line 3: key is 'more', expected cases",
        "cases: []\ncases: []": " line 2: cases: is given twice, first in line 1",
        "cases:\n  - {": " line 2: is no YAML: expected the node content, but found '<stream end>'",
        "cases:\n\t- a": " line 2: is no YAML: found character '\\t' that cannot start any token",
        "cases: []\n---\ncases: []": " line 2: is no YAML: but found another document",
    }.items(),
)
def test_a_bad_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "cases.yaml"
    path.write_text(text)
    with pytest.raises(CaseFileError) as refused:
        read(path)
    assert str(refused.value) == f"{path}{message}"


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path):
    with pytest.raises(CaseFileError, match="none.yaml: cannot be read: No such file or directory$"):
        read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaseFileError, match="bytes.yaml: is no text in UTF-8$"):
        read(tmp_path / "bytes.yaml")


# --- recorded calls ---


def call(scale: float | None = None, tensors: bool = True):
    """Return the arguments of a small call of 2 query tokens and 3 groups, with rows of 1 to 37 tokens."""
    torch.manual_seed(0)
    shapes = (1, 2, 3, 4, 16), (1, 3, 40, 16), (1, 3, 40, 32)
    ranges = torch.tensor([[0, 5], [8, 40]]).expand(1, 2, 3, 2, 2).clone()
    ranges[0, 0, 0] = torch.tensor([[-7, 1], [2**40, 2**40 + 3]])  # one token, once they are clamped
    return *(torch.randn(shape).bfloat16() for shape in shapes), ranges


def test_a_recorded_call_is_a_case_with_its_own_tensors_and_spans(file, tmp_path):
    q, k, v, ranges = call()
    nsa_sel.record(tmp_path / "calls", q, k, v, ranges)
    (case,) = read(file("recorded: calls/*.pt"))
    assert case.id.startswith("recorded-bf16-H4-D16-Dv32-L37-N6-0001-")
    assert (case.B, case.S, case.G, case.S_kv, case.n_spans, case.longest) == (1, 2, 3, 40, 2, 37)
    assert case.ragged and not case.one_length
    x = make_inputs(case, "cpu")
    assert torch.equal(x.q, q) and torch.equal(x.k, k) and torch.equal(x.v, v)
    assert (x.min_len, x.max_len, x.ranges.dtype) == (1, 37, torch.int32)
    assert torch.equal(reference.oracle(x.q, x.k, x.v, x.ranges), reference.oracle(q, k, v, ranges))
    per_token = (16 + 32) * 2
    fixed = q.nbytes + 6 * 4 * 32 * 2 + x.ranges.nbytes
    assert traffic(x) == (fixed + 3 * 37 * per_token, fixed + (5 * 37 + 1) * per_token)
    assert memory_estimate(case) > memory_estimate(case, packed=False) > q.nbytes + k.nbytes + v.nbytes


def test_a_call_recorded_without_tensors_gets_seeded_ones(file, tmp_path):
    q, k, v, ranges = call()
    nsa_sel.record(tmp_path, q, k, v, ranges, tensors=False)
    (case,) = read(file("{recorded: 0001.pt, name: layer3}"))
    assert case.id.endswith("-layer3")
    x, again = make_inputs(case, "cpu"), make_inputs(case, "cpu")
    assert x.q.shape == q.shape and not torch.equal(x.q, q) and torch.equal(x.q, again.q)
    assert torch.equal(spans.lengths(x.ranges, 40), spans.lengths(ranges, 40))


def test_a_recorded_scale_is_multiplied_into_the_query(file, tmp_path):
    q, k, v, ranges = call()
    nsa_sel.record(tmp_path, q, k, v, ranges, scale=0.125)  # half of 1/sqrt(16): exact in bf16
    (case,) = read(file("recorded: '*.pt'"))
    x = make_inputs(case, "cpu")
    expected = reference.oracle(q, k, v, ranges, scale=0.125)
    torch.testing.assert_close(reference.oracle(x.q, x.k, x.v, x.ranges), expected)


def test_a_glob_finds_calls_in_the_order_of_their_names_whatever_folder_one_stands_in(file, tmp_path, monkeypatch):
    q, k, v, ranges = call()
    for start in range(3):
        nsa_sel.record(tmp_path / "a" / "b", q, k, v, ranges + start)
    path = file("recorded: a/**/*.pt", ROWS)
    monkeypatch.chdir("/")
    assert [case.id.split("-")[7] for case in read(path)[:3]] == ["0001", "0002", "0003"]


def test_a_damaged_or_empty_recording_is_named_with_the_files_line(file, tmp_path):
    q, k, v, ranges = call()
    nsa_sel.record(tmp_path, q, k, v, ranges * 0)
    with pytest.raises(CaseFileError, match=r"cases.yaml line 2: recorded: \S*0001.pt: selects no token$"):
        read(file("recorded: 0001.pt"))
    (tmp_path / "0001.pt").write_bytes(b"PK")
    with pytest.raises(CaseFileError, match=r"line 3: recorded: \S*0001.pt: is damaged, or no file of nsa_sel.record"):
        read(file(ROWS, "recorded: 0001.pt"))


def test_a_recording_that_is_written_anew_is_another_case(file, tmp_path):
    q, k, v, ranges = call()
    path = nsa_sel.record(tmp_path, q, k, v, ranges)
    (case,) = read(file("recorded: 0001.pt"))
    path.unlink()
    with pytest.raises(RecordingError, match="cannot be read: No such file"):
        make_inputs(case, "cpu")
    nsa_sel.record(tmp_path, q, k, v, ranges + 1)
    with pytest.raises(RecordingError, match="its ranges are not those of the case; it was written anew since"):
        make_inputs(case, "cpu")
    assert read(file("recorded: 0001.pt"))[0].id != case.id


# --- what a saved run keeps ---


def test_cases_come_back_from_what_a_saved_run_says_of_them(file, tmp_path):
    nsa_sel.record(tmp_path, *call())
    found = read(file(ROWS, DECODE.replace("batch", "G: 2, block: 32, batch"), PREFILL, "recorded: 0001.pt"))
    said = json.loads(json.dumps(definitions(found)))
    assert list(rebuilt(said).values()) == found
    assert known(said).keys() == cases.by_id().keys() | said.keys()


@pytest.mark.parametrize(
    "change",
    [{"H": 8}, {"H": "4"}, {"H": True}, {"G": 0}, {"layout": "none"}, {"more": 1}, {"recorded": {"file": "x"}}],
    ids=str,
)
def test_a_damaged_definition_is_named(file, change):
    said = definitions(read(file(DECODE)))
    (name,) = said
    with pytest.raises(RunError, match=f"'{name}': the run's definition of this case is damaged"):
        rebuilt({name: said[name] | change})
    for value in (None, 3, []):
        with pytest.raises(RunError, match="is damaged"):
            rebuilt({name: value})
