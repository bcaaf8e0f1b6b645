"""Run Python programs as `python ARGUMENTS` does, each in a fork of a process that has imported torch and pytest.

Importing them, and clearing torch away at the end, takes longer than most of these programs. Nothing of the package is
imported before the fork, and nothing of Triton, which reads TRITON_INTERPRET when it is.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TRITON = metadata.version("triton") if importlib.util.find_spec("triton") else "3.7"
needs_interpreter = pytest.mark.skipif(
    Version(TRITON) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton before 3.7 needs a NumPy before 2.4",
)
SECONDS = 300  # for each program


def python(
    *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed; `arguments` as behind `python`: -m MODULE, -c CODE or FILE first."""
    zygote = _zygote()
    assert zygote.stdin is not None and zygote.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        what = {"argv": list(map(str, arguments)), "cwd": str(cwd), "env": dict(env), "files": [str(out), str(err)]}
        print(json.dumps(what), file=zygote.stdin, flush=True)
        status = int(zygote.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    """Start the process that forks; it ends with this one."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)


# --- in the process that forks ---


def run(argv: list[str], cwd: str, env: dict[str, str], files: list[str]) -> int:
    """Run a program in a fork; return its exit status, negative for a signal."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status: int | str | None = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        for number, name in enumerate((os.devnull, *files)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        signal.alarm(SECONDS)  # whose signal ends the program
        become(argv)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(status, str) else status or 0)


def become(argv: list[str]) -> None:
    """Do what `python` does with these arguments."""
    first, *rest = argv
    here = {"-m": os.getcwd(), "-c": ""}.get(first, os.path.dirname(first))
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [here, *given, *sys.path[1:]]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if first == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = [first, *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = argv
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    importlib.import_module("torch")
    gc.freeze()  # pytest collects garbage at its end: not among all of torch
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
