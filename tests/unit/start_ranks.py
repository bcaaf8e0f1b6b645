"""Start the ranks of a job quickly: import what takes long once, and fork them for each job.

A line of standard input is JSON: `ranks`, one {"env", "out"} each, `cwd`, and `argv`, pytest's or a script's. This ends
the other ranks by SIGTERM once one has failed, as torchrun does; what is left `patience` seconds later is killed.
It answers with the exit codes, negative for a signal.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time

import pytest

for name in ("torch.distributed", "triton", "nsa_sel.bench.compare.hooks", "nsa_sel.bench.resume.keeper"):
    importlib.import_module(name)


def start(rank: dict, cwd: str, argv: list[str]) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(cwd)
        os.environ.update(rank["env"])
        file = os.open(rank["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if argv[0].endswith(".py"):
            sys.argv[:] = argv
            try:
                runpy.run_path(argv[0], run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
        else:
            code = int(pytest.main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(pids: list[int], patience: float) -> list[int]:
    """Return the exit codes of all; once one has failed, end the others."""
    codes: dict[int, int] = {}
    failed_at = None
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in codes]
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if failed_at is not None and time.monotonic() - failed_at > patience:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


for line in sys.stdin:
    job = json.loads(line)
    pids = [start(rank, job["cwd"], job["argv"]) for rank in job["ranks"]]
    print(json.dumps(watch(pids, job["patience"])), flush=True)
