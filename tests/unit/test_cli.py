"""The command `nsa-sel`: what it describes, how it hands over to a verb, and its exit codes."""

import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

import nsa_sel
from nsa_sel.bench import cli

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def toggles(tmp_path, monkeypatch):
    """Make a YAML file the only source of toggles, and let no later test find them read."""
    monkeypatch.setattr("nsa_sel.config._cached", None)
    for variable in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(variable)

    def write(text):
        file = tmp_path / "toggles.yaml"
        file.write_text(text)
        monkeypatch.setenv("NSA_SEL_CONFIG", str(file))
        return file

    return write


def line_of(text, start):
    """Return the one line that starts so, its spaces collapsed."""
    (found,) = [" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start)]
    return found


def test_no_verb_names_every_toggle_with_value_and_source(toggles, monkeypatch, capsys):
    file = toggles("runtime: {use_sel_pack: false}")
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "48")
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "use_triton_sel") == "use_triton_sel auto from default"
    assert line_of(out, "sel_triton_min_L") == "sel_triton_min_L {'default': 48} from environment NSA_SEL_TRITON_MIN_L"
    assert line_of(out, "use_sel_pack") == f"use_sel_pack False from file {file}"
    assert line_of(out, "force_parity") == "force_parity False from default"
    assert line_of(out, "sel_validate") == "sel_validate False from default"


def test_no_verb_names_machine_and_versions(toggles, capsys):
    toggles("")
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    python = ".".join(map(str, sys.version_info[:3]))
    assert line_of(out, "nsa_sel") == f"nsa_sel {nsa_sel.__version__}, python {python}"
    assert line_of(out, "torch") == f"torch {torch.__version__}, triton {metadata.version('triton')}"
    assert line_of(out, "CUDA").startswith(f"CUDA {torch.version.cuda or 'none in this torch'}, driver ")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none that torch can use"
    assert gpu in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(("packed", "backend"), [("true", "packed_sdpa"), ("false", "masked_sdpa")])
def test_no_verb_says_what_auto_does_without_a_gpu(toggles, capsys, packed, backend):
    toggles(f"runtime: {{use_sel_pack: {packed}}}")
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for length in cli.EXAMPLE_LENGTHS:
        assert line_of(out, f"L={length} ") == f"L={length} {backend} no CUDA device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the threshold matters only on a GPU")
def test_no_verb_says_from_which_length_auto_uses_triton(toggles, capsys):
    toggles("runtime: {use_triton_sel: 1, sel_triton_min_L: 64}")
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert line_of(out, "L=16 ") == "L=16 packed_sdpa L=16 is below sel_triton_min_L=64"
    assert line_of(out, "L=64 ") == "L=64 triton L=64 is at least sel_triton_min_L=64"


def test_no_verb_reads_the_kill_switch_of_the_environment(toggles, monkeypatch, capsys):
    toggles("")
    monkeypatch.setenv("NSA_FORCE_PARITY", "1")
    assert cli.main([]) == 0
    assert line_of(capsys.readouterr().out, "L=64 ").endswith(
        "packed_sdpa NSA_FORCE_PARITY is on (set by environment NSA_FORCE_PARITY)"
    )


def test_a_malformed_toggle_is_one_line_and_exit_code_2(toggles, monkeypatch, capsys):
    toggles("")
    monkeypatch.setenv("NSA_FORCE_PARITY", "maybe")
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "nsa-sel: NSA_FORCE_PARITY: value is 'maybe', expected 1 or 0\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["nonsense", "compare"]])
def test_an_unknown_verb_names_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_no_verb_lists_the_verbs(toggles, capsys):
    toggles("")
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb:<10} {meaning}\n" in out for verb, (_, meaning) in cli.VERBS.items())


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for verb, (_, meaning) in cli.VERBS.items():
        assert f"{verb} " in out and meaning in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_gets_its_arguments_and_gives_the_exit_code(verb, monkeypatch):
    module_name, function = cli.VERBS[verb][0].split(":")
    received = []
    stand_in = types.SimpleNamespace(**{function: lambda argv: received.append(argv) or 7})
    monkeypatch.setitem(sys.modules, f"{cli.__package__}.{module_name}", stand_in)
    assert cli.main([verb, "--help", "old.json"]) == 7
    assert received == [["--help", "old.json"]]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.function_of(verb)(["--help"])
    assert caught.value.code == 0
    assert f"nsa-sel {verb}" in capsys.readouterr().out


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "nsa_sel", "--version"]
    environment = {"PYTHONPATH": str(REPOSITORY / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{nsa_sel.__version__}\n"), done.stderr
