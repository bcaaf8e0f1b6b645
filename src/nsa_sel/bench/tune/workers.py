"""Compile kernels on all CPU cores ahead of their timing, which then finds them in Triton's disk cache.

Run as a module this is one worker: it reads one kernel per line, builds it by running it once on empty rows, and
answers with one line. A worker that dies or hangs costs one kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ...kernel.launch_config import LaunchConfig
from ...kernel.shared_config import SharedLaunch
from ..parallel import cores
from ..suite.inputs import TORCH_DTYPES
from .space import Variant

if TYPE_CHECKING:
    from ..methods.fused import Packing

MOST_WORKERS = 16
WORKER_BYTES = 1 << 30  # of GPU memory: a context takes about half of it
LIMIT_S = 180  # for one variant, and for the start of its worker before it
Kernel = TypeVar("Kernel", bound="Variant | Packing")
COMMAND = (sys.executable, "-m", f"{__package__}.workers")


def workers() -> int:
    """Return how many workers the CPU cores of this process and the GPU's free memory allow."""
    room = torch.cuda.mem_get_info()[0] // WORKER_BYTES if torch.cuda.is_available() else MOST_WORKERS
    return max(1, min(cores(), MOST_WORKERS, room))


def compile_all(
    kernels: Sequence[Kernel],
    finished: Callable[[], Any],
    *,
    command: Sequence[str] = COMMAND,
    limit_s: float = LIMIT_S,
    total_s: float | None = None,
) -> dict[Kernel, str]:
    """Compile every kernel and return the errors of those that failed; call `finished` after each, in this thread.

    limit_s: for one kernel. total_s: for all of them; None sets no limit.

    Raises: TimeoutError after total_s, when the workers have been stopped.
    """
    end = None if total_s is None else time.monotonic() + total_s
    todo: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[Kernel, str | None]] = queue.SimpleQueue()
    for kernel in kernels:
        todo.put(kernel)
    pool = [_Worker(command, limit_s) for _ in range(min(workers(), len(kernels)))]
    threads = [threading.Thread(target=worker.serve, args=(todo, answers), daemon=True) for worker in pool]
    errors = {}
    try:
        for thread in threads:
            thread.start()
        for _ in kernels:
            try:
                kernel, error = answers.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{len(kernels)} kernels were not compiled in {total_s:.0f} s") from None
            if error is not None:
                errors[kernel] = error
            finished()
    finally:
        for worker in pool:
            worker.stop()
    for thread in threads:
        thread.join()
    return errors


class _Worker:
    """Own one worker process, started when it is first needed and again after it died."""

    def __init__(self, command: Sequence[str], limit_s: float) -> None:
        self.command, self.limit_s = command, limit_s
        self.process: subprocess.Popen[str] | None = None
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def serve(self, todo: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
        """Take kernels until there are none, or until stopped."""
        while not self.stopped.is_set():
            try:
                kernel = todo.get_nowait()
            except queue.Empty:
                return
            try:
                error = self.ask(kernel)
            except Exception as failure:  # whatever it is, the kernel must be answered, or the caller waits for ever
                self.end()
                error = f"{type(failure).__name__}: {failure}"
            answers.put((kernel, error))

    def ask(self, kernel: Variant | Packing) -> str | None:
        """Return the kernel's error, None if it was built."""
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(kernel)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # dead: no answer either
        # One line is written for each line read, so that none can wait in the buffer while select looks at the pipe.
        if not select.select([process.stdout], [], [], self.limit_s)[0]:
            self.end()
            return f"the compiler gave no answer in {self.limit_s:g} s"
        line = process.stdout.readline()
        if not line.endswith("\n"):
            said = self.end()
            return f"the compiler's process died with exit status {process.returncode}: {said}"
        answer = json.loads(line)
        if answer["lost"]:
            self.end()
        return answer["error"]

    def start(self) -> subprocess.Popen[str]:
        with self.lock:
            if self.stopped.is_set():
                raise RuntimeError("stopped")
            if self.process is None:
                self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the sweep, which then stops its workers
                )
            return self.process

    def end(self) -> str:
        """Kill the process, if there is one; return the last line that it wrote to standard error."""
        with self.lock:
            process, self.process = self.process, None
        if process is None:
            return ""
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a line that was never read
                if pipe is not None:
                    pipe.close()
        with self.errors:
            self.errors.seek(0)
            said = [line.strip() for line in self.errors if line.strip()]
        return said[-1][:200] if said else "it said nothing"

    def stop(self) -> None:
        """Kill the process and take no more kernels."""
        self.stopped.set()
        self.end()


def empty_rows(variant: Variant, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and ranges that select nothing, with what a variant's kernel is specialised on."""
    dtype = TORCH_DTYPES[variant.dtype]
    q = torch.zeros(1, variant.S, 1, variant.H, variant.D, dtype=dtype, device=device)
    k = torch.zeros(1, 1, variant.S_kv, variant.D, dtype=dtype, device=device)
    v = torch.zeros(1, 1, variant.S_kv, variant.Dv, dtype=dtype, device=device)
    return q, k, v, torch.zeros(1, variant.S, 1, variant.n_spans, 2, dtype=torch.int32, device=device)


def build(kernel: Variant | Packing) -> None:
    """Compile a kernel through its launcher, with the alignment and types of the timing, for empty rows."""
    from ...kernel import launch, shared_launch  # needs Triton
    from ..methods import fused  # likewise

    if not isinstance(kernel, Variant):
        fused.pack_empty_row(kernel)
    elif kernel.shared is None:
        launch.forward(*empty_rows(kernel, "cuda"), launch=kernel.launch)
    else:
        rows = empty_rows(kernel, "cuda")
        shared_launch.SharedPlan(*rows, None, None, None, kernel.shared, kernel.launch).run(*rows)
    torch.cuda.synchronize()


def kernel_of(fields: dict[str, Any]) -> Variant | Packing:
    """Return the kernel that a worker was sent."""
    from ..methods.fused import Packing  # needs Triton

    if "launch" not in fields:
        return Packing(**fields)
    shared = fields["shared"] and SharedLaunch(**fields["shared"])
    return Variant(**{**fields, "launch": LaunchConfig(**fields["launch"]), "shared": shared})


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def device_answers() -> bool:
    """Tell whether the GPU can still be used; after an illegal memory access this process has lost it."""
    try:
        torch.cuda.synchronize()
    except Exception:  # RuntimeError, or a subclass that newer versions of torch have
        return False
    return True


def serve() -> None:
    """Answer one line for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints is no answer
    for line in sys.stdin:
        fields = json.loads(line)
        error, lost = None, False
        try:
            build(kernel_of(fields))
        except Exception as failure:
            error, lost = one_line(failure), not device_answers()
        print(json.dumps({"error": error, "lost": lost}), file=answers, flush=True)
        if lost:
            return


if __name__ == "__main__":
    serve()
