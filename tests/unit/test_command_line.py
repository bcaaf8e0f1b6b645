"""What every command has: help with each default and an example, errors of one line, an end without readers."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import saved_runs

from nsa_sel.bench import cli, command_line
from nsa_sel.bench.checks import aot, auto, cards, instrument, planning
from nsa_sel.bench.suite import cases, random_cases

ROOT = Path(__file__).parents[2]
OF_PYTEST = ("parity", "bench")  # verbs that hand their arguments to pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("bench_sel_triton")


def help_of(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def says_every_default(text):
    """Tell which options a help lists without their default."""
    options = re.split(r"\n  (?=-)", text.split("\noptions:")[1].split("\n\n")[0])[1:]
    return [each for each in options if not re.search(r"default|required|-h, --help|--version", each)]


def examples_of(text):
    lines = text.split("\nexamples:\n")[1].split("\n\n")[0].splitlines()
    return [re.split(r"  +| > |  #", line.strip())[0] for line in lines]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_says_each_default_and_examples_that_it_takes(verb, capsys, monkeypatch):
    text = help_of(cli.function_of(verb), capsys, monkeypatch)
    assert says_every_default(text) == []
    for example in examples_of(text):
        program, named, *arguments = shlex.split(example)
        assert (program, named) == ("nsa-sel", verb)
        _, not_known = cli.parser_of(verb).parse_known_args(arguments)
        assert not not_known or verb in OF_PYTEST


@pytest.mark.parametrize(
    "module", [aot, auto, cards, instrument, planning], ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_the_help_of_a_check_says_each_default_and_an_example(module, capsys, monkeypatch):
    text = help_of(module.main, capsys, monkeypatch)
    assert says_every_default(text) == []
    assert all(example.startswith(f"python -m {module.__name__}") for example in examples_of(text))


def test_the_help_of_the_script_says_each_default_and_an_example(script, capsys, monkeypatch):
    text = help_of(script.main, capsys, monkeypatch)
    assert says_every_default(text) == [] and examples_of(text)


def test_a_missing_default_would_be_seen():
    assert says_every_default(
        "\noptions:\n  -h, --help  show\n  --a A  first\n  --b B  second (default: 2)\n\nexit"
    ) == ["--a A  first"]


def test_help_fills_paragraphs_and_leaves_indented_ones():
    parser = command_line.Parser("x", description="one\ntwo\n\n  a  1\n  b  2", examples="x --y")
    assert "\none two\n\n  a  1\n  b  2\n" in parser.format_help()


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in OF_PYTEST])
def test_an_unknown_option_is_one_line_and_exit_code_2(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--nonsense"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith(f"nsa-sel {verb}: error: ") and said.count("\n") == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_runs.save(saved_runs.run(cases.matrix("hot")), tmp_path_factory.mktemp("saved") / "good.json")


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """Stand in a folder with a saved run and with files that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").symlink_to(saved)
    (tmp_path / "half.json").write_text('{"benchmarks": [')
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").touch()
    return tmp_path


@pytest.mark.parametrize("bad", ["missing", "half.json", "binary", "folder"])
@pytest.mark.parametrize(
    "command",
    [
        "compare good.json {}",
        "compare {} good.json",
        "report {} --out report",
        "threshold {}",
        "threshold good.json --sel-cases {}",
        "tune --sel-cases {}",
        "continuous --base-dir {} --head-dir folder",
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_2(command, bad, folder, capsys):
    try:
        code = cli.main(shlex.split(command.format(bad)))
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith(f"nsa-sel {command.split()[0]}: ") and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "command",
    [
        "compare good.json good.json --json taken/x.json",
        "report good.json --out taken/report",
        "threshold good.json --matrix hot --apply --config taken/base.yaml",
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(command, folder, capsys):
    assert cli.main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nsa-sel {command.split()[0]}: ") and said.count("\n") == 1, said


# ---- Nobody reads the output


class Closed:
    """Run a command in this process, its standard output a pipe that nobody reads."""

    def __init__(self, folder, monkeypatch):
        self.errors, self.monkeypatch = folder / "errors", monkeypatch

    def __call__(self, command, *, by_line):
        reader, writer = os.pipe()
        os.close(reader)
        # The command turns both away from the pipe, which must not be pytest's own.
        with (
            os.fdopen(writer, "w", buffering=1 if by_line else -1) as out,
            self.errors.open("w") as errors,
            self.monkeypatch.context() as patch,
        ):
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", errors)
            code = command_line.exit_code(command)
        return code, self.errors.read_text()


@pytest.fixture
def closed(folder, monkeypatch):
    return Closed(folder, monkeypatch)


@pytest.mark.parametrize("by_line", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        "",
        "--help",
        "compare good.json good.json",
        "compare --help",
        "threshold good.json",
        "parity --help",
    ],
)
def test_a_verb_whose_output_nobody_reads_ends_in_silence(command, by_line, closed):
    assert closed(lambda: cli.main(shlex.split(command)), by_line=by_line) == (command_line.CLOSED, "")


def test_a_report_whose_output_nobody_reads_is_written(closed, folder):
    command = ["report", "good.json", "--out", "report"]
    assert closed(lambda: cli.main(command), by_line=True) == (command_line.CLOSED, "")
    assert (folder / "report" / "report.html").is_file()


@pytest.mark.parametrize("arguments", [["-m", "nsa_sel"], ["-m", instrument.__name__, "--help"]])
def test_a_program_whose_output_nobody_reads_ends_in_silence(arguments, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": ""}
    command = f"{shlex.join([sys.executable, *arguments])} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{command_line.CLOSED}\n", "")


def test_what_a_command_returns_and_raises_is_passed_on(capsys):
    assert command_line.exit_code(lambda: 3) == 3
    with pytest.raises(SystemExit) as caught:
        command_line.exit_code(lambda: sys.exit(2))
    assert caught.value.code == 2


# ---- Completion


def test_bash_completes_verbs_options_and_their_values(tmp_path, capsys):
    pytest.importorskip("shtab", reason="prints the completion (extra: bench)")
    if shutil.which("bash") is None:
        pytest.skip("no bash to complete in")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "saved.json").touch()

    def completed(*words):
        asked = f"source completion; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
        asked += "; _shtab_nsa_sel; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return set(done.stdout.split())

    assert completed("nsa-sel", "comp") == {"compare", "completion"}
    assert completed("nsa-sel", "compare", "--ma") == {"--markdown"}
    assert completed("nsa-sel", "bench", "--sel-matrix", "") == set(random_cases.MATRICES)
    assert "saved.json" in completed("nsa-sel", "report", "sav")


def test_the_completion_of_zsh_names_every_verb(capsys):
    pytest.importorskip("shtab", reason="prints the completion (extra: bench)")
    assert cli.main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef nsa-sel") and all(f"\n    {verb}:'" in text for verb in cli.VERBS)


def test_without_the_library_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "nsa-sel completion: needs shtab, of the extra `bench`: pip install 'nsa-sel[bench]'\n"
    )
