"""Every toggle, each of its layers, and every way to get one wrong."""

import os
import threading
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from nsa_sel import config
from nsa_sel.config import ConfigError, SelConfig

REPOSITORY = Path(__file__).parents[2]

# field, environment variable, (environment text, value), (YAML text, another value), default
TOGGLES = [
    ("use_triton_sel", "NSA_USE_TRITON_SEL", ("1", True), ("false", False), "auto"),
    ("use_triton_sel", "NSA_USE_TRITON_SEL", ("0", False), ("true", True), "auto"),
    ("use_triton_sel", "NSA_USE_TRITON_SEL", ("auto", "auto"), ("1", True), "auto"),
    ("sel_triton_min_L", "NSA_SEL_TRITON_MIN_L", ("32", {"default": 32}), ("128", {"default": 128}), {"default": 64}),
    ("sel_triton_min_L", "NSA_SEL_TRITON_MIN_L", ("never", {"default": None}), ("7", {"default": 7}), {"default": 64}),
    ("sel_triton_min_L", "NSA_SEL_TRITON_MIN_L", ("9", {"default": 9}), ("null", {"default": None}), {"default": 64}),
    ("use_sel_pack", "NSA_USE_SEL_PACK", ("1", True), ("false", False), True),
    ("use_sel_pack", "NSA_USE_SEL_PACK", ("0", False), ("true", True), True),
    ("force_parity", "NSA_FORCE_PARITY", ("1", True), ("false", False), False),
    ("force_parity", "NSA_FORCE_PARITY", ("0", False), ("true", True), False),
    ("sel_validate", "NSA_SEL_VALIDATE", ("1", True), ("false", False), False),
    ("sel_validate", "NSA_SEL_VALIDATE", ("0", False), ("true", True), False),
    ("sel_record", "NSA_SEL_RECORD", ("0", 0), ("3", 3), 16),
    ("sel_record", "NSA_SEL_RECORD", ("40", 40), ("0", 0), 16),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Hide the toggles that this run of the suite was started with."""
    for variable in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def yaml_file(tmp_path):
    """Write a YAML file and return its path."""

    def write(text: str) -> Path:
        file = tmp_path / "toggles.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.fixture
def fresh_cache(monkeypatch):
    """Forget what this process has read, until the test is over."""
    monkeypatch.setattr(config, "_cached", None)


@pytest.mark.parametrize(("name", "variable", "environment", "in_yaml", "default"), TOGGLES)
def test_precedence_is_environment_then_yaml_then_default(yaml_file, name, variable, environment, in_yaml, default):
    empty, file = {}, yaml_file(f"runtime: {{{name}: {in_yaml[0]}}}")
    env = {variable: environment[0]}

    both = SelConfig.load(file, env)
    assert (getattr(both, name), both.sources[name]) == (environment[1], f"environment {variable}")
    yaml_only = SelConfig.load(file, empty)
    assert (getattr(yaml_only, name), yaml_only.sources[name]) == (in_yaml[1], f"file {file}")
    neither = SelConfig.load(yaml_file("runtime: {}"), empty)
    assert (getattr(neither, name), neither.sources[name]) == (default, "default")


def test_the_default_of_every_field_is_the_one_of_the_repository_file():
    from_file = SelConfig.load(REPOSITORY / "configs/base.yaml", {})
    builtin = SelConfig()
    for name in ("use_triton_sel", "use_sel_pack", "force_parity", "sel_validate", "sel_record"):
        assert getattr(from_file, name) == getattr(builtin, name)
    assert from_file.sel_triton_min_L["default"] == builtin.sel_triton_min_L["default"] == 64


@pytest.mark.parametrize("variable", ["NSA_USE_SEL_PACK", "NSA_FORCE_PARITY", "NSA_SEL_VALIDATE"])
@pytest.mark.parametrize("text", ["", "true", "on", "2", "auto", " 1", "01"])
def test_a_malformed_switch_names_variable_value_and_choices(yaml_file, variable, text):
    with pytest.raises(ConfigError) as caught:
        SelConfig.load(yaml_file(""), {variable: text})
    assert str(caught.value) == f"{variable}: value is {text!r}, expected 1 or 0"


@pytest.mark.parametrize("text", ["", "yes", "2", "AUTO", "1 "])
def test_a_malformed_switch_with_auto_names_its_choices(yaml_file, text):
    with pytest.raises(ConfigError) as caught:
        SelConfig.load(yaml_file(""), {"NSA_USE_TRITON_SEL": text})
    assert str(caught.value) == f"NSA_USE_TRITON_SEL: value is {text!r}, expected 1, 0 or auto"
    with pytest.raises(ConfigError, match=r"^NSA_TEST_TRITON_SEL: value is .*, expected 1, 0, gpu or auto$"):
        config.test_triton_sel({"NSA_TEST_TRITON_SEL": text})


@pytest.mark.parametrize("text", ["", "0", "-1", "64.0", "1e3", "0x40", "null", "6_4", "٣", "²"])
def test_a_malformed_min_len_names_its_choices(yaml_file, text):
    with pytest.raises(ConfigError) as caught:
        SelConfig.load(yaml_file(""), {"NSA_SEL_TRITON_MIN_L": text})
    assert str(caught.value) == f"NSA_SEL_TRITON_MIN_L: value is {text!r}, expected a positive integer or never"


@pytest.mark.parametrize("text", ["", "-1", "1.0", "many", "1_0", "٣"])
def test_a_malformed_count_names_its_choices(yaml_file, text):
    with pytest.raises(ConfigError) as caught:
        SelConfig.load(yaml_file(""), {"NSA_SEL_RECORD": text})
    assert str(caught.value) == f"NSA_SEL_RECORD: value is {text!r}, expected a whole number, 0 or more"


def test_a_malformed_value_that_a_higher_layer_hides_is_still_an_error(yaml_file):
    with pytest.raises(ConfigError, match="runtime.force_parity"):
        SelConfig.load(yaml_file("runtime: {force_parity: maybe}"), {"NSA_FORCE_PARITY": "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime: {force_parity: maybe}", r"runtime.force_parity: value is 'maybe', expected true or false"),
        ("runtime: {use_sel_pack: 2}", r"runtime.use_sel_pack: value is 2, expected true or false"),
        ("runtime: {use_sel_pack: 1.0}", r"runtime.use_sel_pack: value is 1.0, expected true or false"),
        ("runtime: {sel_validate: }", r"runtime.sel_validate: value is None, expected true or false"),
        ("runtime: {sel_record: true}", r"runtime.sel_record: value is True, expected a whole number, 0 or more"),
        ("runtime: {use_triton_sel: [1]}", r"runtime.use_triton_sel: value is \[1\], expected auto, true or false"),
        ("runtime: {sel_triton_min_L: 0}", r"runtime.sel_triton_min_L: value is 0, expected a positive integer"),
        ("runtime: {sel_triton_min_L: true}", r"runtime.sel_triton_min_L: value is True, expected a positive integer"),
        ("runtime: {sel_triton_min_L: {X: 6.5}}", r"sel_triton_min_L\['X'\]: value is 6.5, expected a positive"),
        (
            "runtime: {sel_triton_min_L: {X: {inference: 16}}}",
            r"sel_triton_min_L\['X'\]: value is .*, expected the keys inference and training",
        ),
        (
            "runtime: {sel_triton_min_L: {inference: 16, training: 0}}",
            r"sel_triton_min_L.training: value is 0, expected a positive integer",
        ),
        ("runtime: {sel_triton_min_L: {inference: 16, X: 3}}", r"expected the keys inference and training"),
        ("runtime: {sel_triton_min_L: {90: 64}}", r"sel_triton_min_L: value is 90, expected a GPU name or default"),
        ("runtime: {min_L: 64}", r"runtime: key is 'min_L', expected one of use_triton_sel, sel_triton_min_L, use_sel"),
        ("use_sel_pack: true", r"key is 'use_sel_pack', expected one of runtime$"),
        ("runtime: [1, 2]", r"runtime: value is \[1, 2\], expected a mapping with the keys use_triton_sel"),
        ("just text", r"value is 'just text', expected a mapping with the keys runtime$"),
        ("runtime: {force_parity: true, force_parity: false}", r"key 'force_parity' is given twice"),
        ("runtime: {sel_triton_min_L: {X: 1, X: 2}}", r"key 'X' is given twice"),
        ("runtime: {", r"cannot be read as YAML"),
        ("runtime: !!python/object/apply:os.getcwd []", r"cannot be read as YAML"),
    ],
)
def test_a_malformed_file_names_file_key_value_and_choices(yaml_file, text, message):
    file = yaml_file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        SelConfig.load(file, {})
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("make", [lambda file: file.mkdir(), lambda file: file.write_bytes(b"\xff\xfe\x00")])
def test_an_unreadable_file_is_a_config_error(tmp_path, make):
    file = tmp_path / "broken.yaml"
    make(file)
    with pytest.raises(ConfigError, match=r"broken.yaml: cannot be read as YAML"):
        SelConfig.load(file, {})


def test_a_file_named_by_argument_and_absent_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read as YAML: .*No such file"):
        SelConfig.load(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize("text", ["", "absent.yaml"])
def test_a_file_named_by_the_environment_and_absent_names_the_variable(text):
    with pytest.raises(ConfigError) as caught:
        SelConfig.load(env={"NSA_SEL_CONFIG": text})
    assert str(caught.value) == f"NSA_SEL_CONFIG: value is {text!r}, expected the path of a YAML file that exists"


def test_the_file_is_argument_then_environment_then_working_directory_then_packaged(tmp_path, monkeypatch):
    def write(relative: str, min_len: int) -> Path:
        file = tmp_path / relative
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"runtime: {{sel_triton_min_L: {min_len}}}", encoding="utf-8")
        return file

    argument, named = write("argument.yaml", 1), write("named.yaml", 2)
    monkeypatch.chdir(tmp_path)
    env = {"NSA_SEL_CONFIG": str(named)}
    assert SelConfig.load(argument, env).min_len_for(None) == 1
    assert SelConfig.load(env=env).min_len_for(None) == 2
    assert SelConfig.load(env={}).sources["use_sel_pack"] == f"file {config.__file__[:-9]}base.yaml"
    write("configs/base.yaml", 3)
    assert SelConfig.load(env={}).min_len_for(None) == 3
    assert SelConfig.load(env={}).sources["sel_triton_min_L"] == "file configs/base.yaml"


def test_the_packaged_file_is_the_repository_file():
    packaged = Path(config.__file__).with_name("base.yaml")
    assert packaged.read_bytes() == (REPOSITORY / "configs/base.yaml").read_bytes()


def test_load_reads_the_process_environment_again(monkeypatch):
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "11")
    assert SelConfig.load().min_len_for(None) == 11
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "12")
    assert SelConfig.load().min_len_for(None) == 12


def test_min_len_is_looked_up_by_gpu_name_then_default(yaml_file):
    loaded = SelConfig.load(yaml_file("runtime: {sel_triton_min_L: {default: 96, Measured: 32, Slow: null}}"), {})
    assert [loaded.min_len_for(name) for name in ("Measured", "Slow", "Other", None)] == [32, None, 96, 96]
    assert loaded.has_entry("Measured") and loaded.has_entry("Slow")
    assert not any(loaded.has_entry(name) for name in ("Other", "default", None))


def test_a_map_without_default_keeps_the_built_in_one(yaml_file):
    assert SelConfig.load(yaml_file("runtime: {sel_triton_min_L: {Measured: 32}}"), {}).min_len_for("Other") == 64


@pytest.mark.parametrize(("text", "expected"), [("48", 48), ("never", None)])
def test_one_number_from_the_environment_holds_for_every_gpu_and_forgets_no_measurement(yaml_file, text, expected):
    file = yaml_file("runtime: {sel_triton_min_L: {Measured: 32, Slow: null}}")
    loaded = SelConfig.load(file, {"NSA_SEL_TRITON_MIN_L": text})
    assert [loaded.min_len_for(name) for name in ("Measured", "Slow", "Other")] == [expected] * 3
    assert loaded.has_entry("Measured") and not loaded.has_entry("Other")


def test_an_entry_tells_training_apart(yaml_file):
    regimes = "{inference: 16, training: 128}"
    loaded = SelConfig.load(yaml_file(f"runtime: {{sel_triton_min_L: {{Measured: {regimes}, Slow: 32}}}}"), {})
    assert [loaded.min_len_for(name) for name in ("Measured", "Slow", "Other")] == [16, 32, 64]
    assert [loaded.min_len_for(name, training=True) for name in ("Measured", "Slow", "Other")] == [128, None, None]
    everywhere = SelConfig.load(yaml_file(f"runtime: {{sel_triton_min_L: {regimes}}}"), {})
    assert [everywhere.min_len_for("Any", training) for training in (False, True)] == [16, 128]
    assert not everywhere.has_entry("inference")
    changed = SelConfig.load(
        yaml_file(f"runtime: {{sel_triton_min_L: {{Measured: {regimes}}}}}"), {"NSA_SEL_TRITON_MIN_L": "7"}
    )
    assert [changed.min_len_for("Measured", training) for training in (False, True)] == [7, 128]


@pytest.mark.parametrize(
    "fields",
    [
        {"use_triton_sel": "1"},
        {"sel_triton_min_L": "64"},
        {"sel_triton_min_L": {"default": -1}},
        {"use_sel_pack": "on"},
        {"force_parity": None},
        {"sel_validate": 2},
    ],
)
def test_a_config_built_by_hand_is_checked_too(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"^{name}"):
        SelConfig(**fields)


def test_a_config_is_frozen_and_keeps_no_reference_to_the_callers_map():
    given = {"default": 5}
    built = SelConfig(sel_triton_min_L=given)
    given["default"] = 6
    assert built.min_len_for(None) == 5
    assert built.sources["sel_triton_min_L"] == "call argument"
    with pytest.raises(FrozenInstanceError):
        built.force_parity = True


def test_the_process_reads_its_toggles_once_even_from_many_threads(fresh_cache, monkeypatch):
    reads = []
    real_load = SelConfig.load
    barrier = threading.Barrier(8)

    def counting_load():
        reads.append(1)
        time.sleep(0.05)  # time for the other threads to come in, were they let
        return real_load()

    monkeypatch.setattr(SelConfig, "load", counting_load)
    results = []

    def read():
        barrier.wait()
        results.append(config.get_config())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert len(results) == 8 and all(result is results[0] for result in results)


def test_the_process_keeps_what_it_read_first(fresh_cache, monkeypatch):
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "21")
    assert config.get_config().min_len_for(None) == 21
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "22")
    assert SelConfig.load().min_len_for(None) == 22
    assert config.get_config().min_len_for(None) == 21


def test_a_failed_first_read_is_not_kept(fresh_cache, monkeypatch):
    monkeypatch.setenv("NSA_USE_SEL_PACK", "perhaps")
    with pytest.raises(ConfigError):
        config.get_config()
    monkeypatch.setenv("NSA_USE_SEL_PACK", "0")
    assert config.get_config().use_sel_pack is False


def test_the_kill_switch_of_the_process_holds_for_a_config_given_to_a_call(fresh_cache, monkeypatch):
    given = SelConfig(use_triton_sel=True)
    monkeypatch.setenv("NSA_FORCE_PARITY", "1")
    effective = config.config_for_call(given)
    assert effective.force_parity and effective.use_triton_sel is True
    assert effective.sources["force_parity"] == "environment NSA_FORCE_PARITY"
    assert config.config_for_call(None) is config.get_config()


def test_a_config_given_to_a_call_wins_over_everything_but_the_kill_switch(fresh_cache, monkeypatch):
    monkeypatch.setenv("NSA_USE_TRITON_SEL", "0")
    given = SelConfig(use_triton_sel=True, force_parity=True)
    assert config.config_for_call(given) is given
    with pytest.raises(TypeError, match=r"^config: type is dict, expected nsa_sel.SelConfig or None$"):
        config.config_for_call({})


@pytest.mark.parametrize(("env", "expected"), [({}, "auto"), ({"NSA_TEST_TRITON_SEL": "auto"}, "auto")])
def test_the_parity_toggle_is_auto_unless_set(env, expected):
    assert config.test_triton_sel(env) == expected
    assert config.test_triton_sel({"NSA_TEST_TRITON_SEL": "1"}) is True
    assert config.test_triton_sel({"NSA_TEST_TRITON_SEL": "0"}) is False
    assert config.test_triton_sel({"NSA_TEST_TRITON_SEL": "gpu"}) == "gpu"
