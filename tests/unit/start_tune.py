"""Run `nsa-sel tune` with stand-ins for GPU and compiler: python FILE ARGUMENTS.

RANK_DOES says what befalls rank 1. PYTHONPATH must have this folder.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

from sweep_fakes import H200, FakeBench, FakeCompiler

from nsa_sel.bench.timer import machine
from nsa_sel.bench.tune import command, gpu
from nsa_sel.bench.tune.sweep import DeviceLost

rank = os.environ.get("RANK", "0")
does = os.environ.get("RANK_DOES", "")
compiler = FakeCompiler()
card = {
    "gpu": H200.name,
    "gpu_id": f"card{rank}",
    "driver": "580",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
}
machine._identity = lambda: card


class Bench(FakeBench):
    def samples(self, launch, rounds, warmup):
        if rank == "1" and sum(self.sampled.values()) == 40:
            if does == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if does == "hang":
                time.sleep(60)
            if does == "lose" and not os.path.exists("lost"):
                Path("lost").touch()
                raise DeviceLost("an illegal memory access")
        return super().samples(launch, rounds, warmup)


bench = Bench()
gpu.find, gpu.GpuSweepDevice = lambda: H200, lambda: bench
command.tune = functools.partial(command.tune, compile_all=compiler)
os.execv, execv = lambda *_: execv(sys.executable, [sys.executable, __file__, *sys.argv[1:]]), os.execv
try:
    code = command.main(sys.argv[1:])
finally:
    said = {"timed": sorted({case.id for case, _ in bench.sampled}), "compiled": len(compiler.compiled)}
    Path(f"did-{rank}.json").write_text(json.dumps(said | {"timings": sum(bench.sampled.values())}))
sys.exit(code)
