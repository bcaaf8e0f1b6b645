"""The toggles: environment over YAML file over built-in default, parsed strictly, read nowhere else.

Source: README.md, "Toggles".
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

UseTriton = Literal["auto"] | bool
MinLen = int | None | Mapping[str, int | None]
REGIMES = ("inference", "training")

DEFAULT_MIN_LEN = 64
DEFAULT_RECORD = 16
_WORKING_DIRECTORY_FILE = Path("configs/base.yaml")
PACKAGED_FILE = Path(__file__).with_name("base.yaml")


class ConfigError(ValueError):
    """Report a malformed toggle: the variable or key, its value, and what is allowed."""


@dataclass(frozen=True)
class SelConfig:
    """Hold the toggles of one call or of the process.

    use_triton_sel: may `"auto"` choose Triton: "auto" = on GPUs with an entry in sel_triton_min_L, True = on any,
    False = never.
    sel_triton_min_L: L in tokens from which it does, by GPU name plus "default"; None = never. A map of REGIMES tells
    calls that need a gradient apart; a number means never for them. Either in place of the map means every GPU.
    use_sel_pack: fall back to packed SDPA (True) or masked SDPA (False).
    force_parity: kill switch: Triton never runs, SDPA runs without its flash and cuDNN backends.
    sel_validate: check ranges, at the cost of a device sync.
    sel_record: how many calls `record` keeps in a folder; 0 = none.
    sources: where each field's value came from, for people.

    Raises: ConfigError for a field of another type or out of its range.
    """

    use_triton_sel: UseTriton = "auto"
    sel_triton_min_L: Mapping[str, MinLen] = field(default_factory=lambda: {"default": DEFAULT_MIN_LEN})
    use_sel_pack: bool = True
    force_parity: bool = False
    sel_validate: bool = False
    sel_record: int = DEFAULT_RECORD
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        object.__setattr__(self, "sources", {name: self.sources.get(name, "call argument") for name in _CHECKS})

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None) -> SelConfig:
        """Read the YAML file and the environment again, leaving `get_config()` as it is.

        path: the YAML file; None: NSA_SEL_CONFIG, else configs/base.yaml of the working directory, else the packaged
        copy.
        env: variables to read in place of os.environ.

        Raises: ConfigError for an unreadable file, an unknown key or a malformed value.
        """
        env = os.environ if env is None else env
        file = _find_file(path, env)
        values: dict[str, Any] = {}
        sources = dict.fromkeys(_CHECKS, "default")
        for name, value in _read_yaml(file).items():
            values[name] = _CHECKS[name](f"{file}: runtime.{name}", value)
            sources[name] = f"file {file}"
        for variable, (name, parse) in _ENVIRONMENT.items():
            if variable in env:
                value = parse(variable, env[variable])
                if name == "sel_triton_min_L":
                    # One number for every GPU changes the threshold, not which GPUs were measured.
                    known = {"default": None, **values.get(name, {})}
                    value = {gpu: with_inference(entry, value) for gpu, entry in known.items()}
                values[name] = value
                sources[name] = f"environment {variable}"
        return cls(**values, sources=sources)

    def has_entry(self, gpu_name: str | None) -> bool:
        """Tell whether this GPU has a measured entry of its own in `sel_triton_min_L`."""
        return gpu_name != "default" and gpu_name in self.sel_triton_min_L

    def min_len_for(self, gpu_name: str | None, training: bool = False) -> int | None:
        """Return the L from which Triton is worth running on this GPU, None for never. training: with a gradient."""
        known = gpu_name is not None and gpu_name in self.sel_triton_min_L
        entry = self.sel_triton_min_L[gpu_name if known else "default"]  # type: ignore[index]
        if isinstance(entry, Mapping):
            return entry[REGIMES[training]]
        return None if training else entry


def with_inference(entry: MinLen, min_len: int | None) -> MinLen:
    """Return an entry of sel_triton_min_L with another length for calls without a gradient."""
    return {**entry, "inference": min_len} if isinstance(entry, Mapping) else min_len


def config_to_write() -> Path:
    """Return the file that this process would read if it is there: that of NSA_SEL_CONFIG, else of this folder."""
    return Path(os.environ.get("NSA_SEL_CONFIG", _WORKING_DIRECTORY_FILE))


_cached: SelConfig | None = None
_cache_lock = threading.Lock()


def get_config() -> SelConfig:
    """Return the toggles of this process, read once at first use.

    Raises: ConfigError as `SelConfig.load`; nothing is kept then, the next call reads again.
    """
    global _cached
    if _cached is None:
        with _cache_lock:
            if _cached is None:
                _cached = SelConfig.load()
    return _cached


def config_for_call(config: SelConfig | None) -> SelConfig:
    """Return the toggles of a call that was given `config`: those, except that the process's kill switch stays on.

    Raises: TypeError if config is neither None nor a SelConfig; ConfigError as `get_config`.
    """
    process = get_config()
    if config is None:
        return process
    if not isinstance(config, SelConfig):
        raise TypeError(f"config: type is {type(config).__name__}, expected nsa_sel.SelConfig or None")
    if process.force_parity and not config.force_parity:
        sources = {**config.sources, "force_parity": process.sources["force_parity"]}
        return replace(config, force_parity=True, sources=sources)
    return config


def test_triton_sel(env: Mapping[str, str] | None = None) -> UseTriton | Literal["gpu"]:
    """Read NSA_TEST_TRITON_SEL for the parity suite.

    True: Triton must run. "gpu": on a GPU; its interpreter does not count. False: skip. "auto": run if it can.

    Raises: ConfigError for a malformed value.
    """
    text = (os.environ if env is None else env).get("NSA_TEST_TRITON_SEL", "auto")
    if text not in ("0", "1", "gpu", "auto"):
        raise _malformed("NSA_TEST_TRITON_SEL", text, "1, 0, gpu or auto")
    return "gpu" if text == "gpu" else _parse_switch_or_auto("NSA_TEST_TRITON_SEL", text)


test_triton_sel.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it where it is imported


def _malformed(where: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{where}: value is {value!r}, expected {allowed}")


def _parse_switch(variable: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise _malformed(variable, text, "1 or 0")
    return text == "1"


def _parse_switch_or_auto(variable: str, text: str) -> UseTriton:
    if text not in ("0", "1", "auto"):
        raise _malformed(variable, text, "1, 0 or auto")
    return "auto" if text == "auto" else text == "1"


def _parse_min_len(variable: str, text: str) -> int | None:
    if text == "never":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise _malformed(variable, text, "a positive integer or never")
    return int(text)


def _parse_count(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _malformed(variable, text, "a whole number, 0 or more")
    return int(text)


_ENVIRONMENT: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "NSA_USE_TRITON_SEL": ("use_triton_sel", _parse_switch_or_auto),
    "NSA_SEL_TRITON_MIN_L": ("sel_triton_min_L", _parse_min_len),
    "NSA_USE_SEL_PACK": ("use_sel_pack", _parse_switch),
    "NSA_FORCE_PARITY": ("force_parity", _parse_switch),
    "NSA_SEL_VALIDATE": ("sel_validate", _parse_switch),
    "NSA_SEL_RECORD": ("sel_record", _parse_count),
}


def _check_switch(where: str, value: object) -> bool:
    # `in (0, 1)` alone would let 1.0 through.
    if type(value) not in (bool, int) or value not in (0, 1):
        raise _malformed(where, value, "true or false")
    return bool(value)


def _check_switch_or_auto(where: str, value: object) -> UseTriton:
    if value == "auto":
        return "auto"
    if type(value) not in (bool, int) or value not in (0, 1):
        raise _malformed(where, value, "auto, true or false")
    return bool(value)


def _check_min_len_map(where: str, value: object) -> dict[str, MinLen]:
    if not isinstance(value, Mapping) or set(value) & set(REGIMES):
        return {"default": _check_regimes(where, value)}
    entries: dict[str, MinLen] = {"default": DEFAULT_MIN_LEN}
    for gpu_name, entry in value.items():
        if not isinstance(gpu_name, str) or not gpu_name:
            raise _malformed(where, gpu_name, "a GPU name or default as the key")
        entries[gpu_name] = _check_regimes(f"{where}[{gpu_name!r}]", entry)
    return entries


def _check_regimes(where: str, value: object) -> MinLen:
    if not isinstance(value, Mapping):
        return _check_min_len(where, value)
    if set(value) != set(REGIMES):
        raise _malformed(where, value, "the keys inference and training")
    return {regime: _check_min_len(f"{where}.{regime}", value[regime]) for regime in REGIMES}


def _check_min_len(where: str, value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise _malformed(where, value, "a positive integer, null (never), or at the top a map of those by GPU name")
    return value


def _check_count(where: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise _malformed(where, value, "a whole number, 0 or more")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "use_triton_sel": _check_switch_or_auto,
    "sel_triton_min_L": _check_min_len_map,
    "use_sel_pack": _check_switch,
    "force_parity": _check_switch,
    "sel_validate": _check_switch,
    "sel_record": _check_count,
}


class _NoDuplicates(yaml.SafeLoader):
    """Load YAML as safe_load does, but reject a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


def _find_file(path: str | os.PathLike[str] | None, env: Mapping[str, str]) -> Path:
    if path is not None:
        return Path(path)
    if "NSA_SEL_CONFIG" in env:
        file = Path(env["NSA_SEL_CONFIG"])
        if not file.is_file():
            raise _malformed("NSA_SEL_CONFIG", env["NSA_SEL_CONFIG"], "the path of a YAML file that exists")
        return file
    return _WORKING_DIRECTORY_FILE if _WORKING_DIRECTORY_FILE.is_file() else PACKAGED_FILE


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return the `runtime` section of a file, its keys known and its values not yet checked."""
    try:
        # A SafeLoader subclass: tags never construct arbitrary objects.
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_NoDuplicates)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
    content = _check_section(str(file), content, ["runtime"])
    return _check_section(f"{file}: runtime", content.get("runtime"), list(_CHECKS))


def _check_section(where: str, content: object, allowed: list[str]) -> dict[str, Any]:
    if content is None:  # an empty file or section
        return {}
    if not isinstance(content, dict):
        raise _malformed(where, content, f"a mapping with the keys {', '.join(allowed)}")
    for key in content:
        if key not in allowed:
            raise ConfigError(f"{where}: key is {key!r}, expected one of {', '.join(allowed)}")
    return content
