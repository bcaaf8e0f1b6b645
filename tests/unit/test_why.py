"""`nsa-sel why`: the launch that a call gets, who chose it, and which rule decided each of its fields."""

from __future__ import annotations

import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from test_rules import GPUS, calls

from nsa_sel.bench.checks import planning
from nsa_sel.bench.methods import prepare
from nsa_sel.bench.suite.cases import rows_case
from nsa_sel.bench.suite.inputs import make_inputs
from nsa_sel.bench.why import command
from nsa_sel.kernel import choice, rules, tuned_table
from nsa_sel.kernel.call import Call
from nsa_sel.kernel.launch_config import LaunchConfig, chunk_width
from nsa_sel.kernel.tuned_table import Entry, Key, Table

DECODE = ["--H", "16", "--D", "128", "--N", "4", "--L", "1024", "--spans", "16"]


@pytest.fixture
def no_table(tmp_path, monkeypatch):
    """Let no tuned table be found."""
    monkeypatch.setattr(tuned_table, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(tuned_table, "PACKAGED", tmp_path)
    tuned_table.forget()
    yield tmp_path
    tuned_table.forget()


def why(capsys, *arguments) -> list[str]:
    assert command.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("gpu", GPUS)
def test_a_choice_is_explained_field_by_field(gpu):
    seen = set()
    for call in calls(3000):
        choice_of = rules.decide(call, GPUS[gpu])
        launch, by_field = choice_of.launch, choice_of.by_field
        seen.add(choice_of.rule)
        assert launch == rules.choose(call, GPUS[gpu]) and list(by_field) == list(asdict(launch))
        assert (launch.block_d, launch.block_dv) == (chunk_width(call.D), chunk_width(call.Dv))
        smaller = [name for name, value in asdict(launch).items() if value != getattr(choice_of.wanted, name)]
        fitted = {name for name, why in by_field.items() if "made to fit" in why}
        assert fitted == set(smaller) <= {"load", "block_l", "num_stages"}
        assert ("made to fit from" in choice_of.reason) == bool(smaller)
    assert len(seen) > 10


def test_every_rule_decides_some_call_and_says_something_of_its_own():
    asked = [(call, gpu) for gpu in GPUS.values() for call in calls(10_000)]
    said = {rules.decide(call, gpu).rule for call, gpu in asked}
    ladder = [rule for _, rule, _ in rules._tiles(Call(1, 8, 128, 128, 1, 1024), GPUS["sm_90"], 8, 8)]
    assert len(ladder) == len(set(ladder)) <= 30 and said == set(ladder)
    assert all(rule and rule == rule.strip() and len(rule) < 90 for rule in said)


@pytest.mark.parametrize(
    ("asked", "launch", "rule"),
    [
        ("H16 D128 N4 L1024 spans16 gpuH200", "split8 cluster8", "blocks of few rows: whole tiles"),
        ("H16 D128 N4 L1024 spans16 gpusm_80", "split8", "until programs fill the GPU: the last to arrive merges"),
        ("H64 D160 N5 L5000 spans32 gpuH200", "gather BL64", "more than 32 heads"),
        ("H8 D128 N64 L1024 spans8 gpusm_89", "BL64", "128, made to fit into shared memory"),
        ("H16 D128 N4 L1024 spans16 dtypefp32 gpuH200", "gather BL", "fp32: products without tensor cores"),
        ("H16 D192 Dv128 N16384 S4096 L1024 spans16 gpuB200", "w1", "blocks of many rows: one warp"),
        ("H8 D128 N256 L2896 spans1 unequal gpuH200", "split4", "rows of unequal lengths are split for the longest"),
    ],
)
def test_the_launch_and_the_rule_that_decided(no_table, capsys, asked, launch, rule):
    named = re.findall(r"(spans|gpu|dtype|unequal|Dv|[HDNLS])(\S*)", asked)
    lines = why(capsys, *(part for name, value in named for part in (f"--{name}", value) if part))
    assert launch in lines[2] and lines[2].startswith("launch ")
    assert lines[3].startswith("chosen by  rules: ")
    assert any(rule in line for line in lines[3:])


def test_every_field_is_named_once(no_table, capsys):
    lines = why(capsys, *DECODE, "--gpu", "H200")
    fields = [part.split()[0] for line in lines[4:] for part in line.strip().partition(":")[0].split(", ")]
    assert sorted(fields) == sorted(LaunchConfig.__dataclass_fields__)


def test_an_entry_of_the_tuned_table_goes_before_the_rules(no_table, capsys):
    call = Call(4, 16, 128, 128, 16, 1024, one_length=True)
    gpu = command.known_gpu("H200")
    tuned = LaunchConfig("gather", 32, 128, 128, 2, 3)
    table = Table(gpu.name, {"torch": "2"}, {Key.of(call, gpu): Entry(tuned)})
    (no_table / tuned_table.file_name(gpu.name)).write_text(table.as_json())
    tuned_table.forget()
    assert choice.explain(call, gpu).launch == tuned
    lines = why(capsys, *DECODE, "--gpu", "NVIDIA H200")
    assert lines[2] == f"launch     {tuned}"
    assert lines[3] == f"chosen by  tuned table: measured to be the fastest for {Key.of(call, gpu)}"
    assert why(capsys, *DECODE, "--gpu", "H200", "--no-max-len")[3].startswith("chosen by  rules: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DECODE, "--gpu", "H9000"], "--gpu: value is 'H9000', expected one of A30, "),
        ([*DECODE, "--D", "100", "--gpu", "H200"], "--D: value is 100, expected a multiple of 16 up to 256"),
        ([*DECODE, "--H", "65", "--gpu", "H200"], "--H: value is 65, expected 1 to 64"),
        ([*DECODE, "--N", "0", "--gpu", "H200"], "--N: value is 0, expected at least 1"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and f"nsa-sel why: error: {message}" in capsys.readouterr().err


def test_without_a_gpu_one_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(DECODE)
    assert "--gpu: there is no GPU here, expected one of " in capsys.readouterr().err


def test_a_benchmark_saves_its_launch_and_the_reason(no_table, monkeypatch):
    launch = pytest.importorskip("nsa_sel.kernel.launch")
    case = rows_case("bf16", "few", 4, 64, 64, 48, 4)
    x = make_inputs(case, "cpu")
    monkeypatch.setattr(launch, "unsupported_reason", lambda *tensors: None)
    monkeypatch.setattr(prepare, "_operation", lambda x, backend: lambda: setattr(launch, "_launches", -1))
    details = prepare._triton(SimpleNamespace(case=case, inputs=x), core=False).details
    launched = launch.launch_for(x.q, x.k, x.v, x.ranges, min_len=48, max_len=48)
    call = launch.call_of(x.q, x.k, x.v, x.ranges, min_len=48, max_len=48)
    rule = rules.decide(call, launch.gpu_of(x.q.device)).rule
    assert details == {"config": str(launched), "config_reason": f"rules: {rule}"}


def test_planning_is_timed_without_a_gpu(monkeypatch, capsys):
    pytest.importorskip("nsa_sel.kernel.launch")
    monkeypatch.setattr(planning, "TIMES", 3)
    monkeypatch.setattr(planning.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(planning, "LIMIT_US", 1e6)
    assert planning.main([]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and all(re.search(r"^\S+: a plan \d+\.\d µs$", line) for line in out[:3])
    monkeypatch.setattr(planning, "LIMIT_US", 0.0)
    assert planning.main([]) == 1
