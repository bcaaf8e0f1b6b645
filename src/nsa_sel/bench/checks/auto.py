"""Show that backend="auto", given both hints, is never much slower than the better of the two forms it chooses from.

Times "auto", "triton" and "packed_sdpa" (eager) of every case beside one another on the GPU: device time with a cold
L2, and host time per call. Exits 1 where "auto" takes more than 10 % + 2 µs longer than the faster of the other two,
twice.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections import Counter

import torch

from ... import UnsupportedError, choose_route, selection_attention
from ...config import get_config
from ..command_line import Parser, exit_code
from ..methods.contender import CaseState, NotTimed
from ..suite import cases
from ..suite.cases import Case
from ..suite.inputs import memory_estimate
from ..timer.timing import Call, DeviceTimer, call_time
from ..tune.log import Progress

SLACK, SLACK_US = 1.10, 2.0
FORMS = ("auto", "triton", "packed_sdpa")
KINDS = ("device", "call")


def excess(auto_us: float, triton_us: float, packed_us: float) -> float:
    """Return by how many µs "auto" is beyond what it may take; negative if it is within."""
    return auto_us - (SLACK * min(triton_us, packed_us) + SLACK_US)


def _measure(calls: dict[str, Call], timer: DeviceTimer) -> dict[str, dict[str, float]]:
    """Return for device and call the µs of each form."""
    times: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for form, call in calls.items():
        device_us = statistics.median(timer.samples(call, rounds=15, warmup=2)) * 1e6
        times["device"][form] = device_us
        times["call"][form] = call_time(call, max(timer.host_us, device_us)).us
    return times


def judge(case: Case, timer: DeviceTimer) -> tuple[str, dict[str, float], list[str]]:
    """Return what "auto" chose, its excess by kind, and a line per kind in which it is too slow twice.

    Raises:
        NotTimed: a form needs more memory than there is, or cannot run the case.
    """
    state = CaseState(case, timer)
    state.require(memory_estimate(case))
    x = state.inputs
    tensors = x.q, x.k, x.v, x.ranges
    operation = functools.partial(selection_attention, *tensors, min_len=x.min_len, max_len=x.max_len)
    calls: dict[str, Call] = {form: functools.partial(operation, backend=form) for form in FORMS}
    route = choose_route(*tensors, min_len=x.min_len, max_len=x.max_len)
    try:
        for call in calls.values():
            call()
        slow: set[str] = set(KINDS)
        beyond: dict[str, float] = {}
        lines: list[str] = []
        for _ in range(2):  # what looks slow is measured again
            times, lines = _measure(calls, timer), []
            for kind in sorted(slow):
                beyond[kind] = excess(*(times[kind][form] for form in FORMS))
                if beyond[kind] > 0:
                    figures = ", ".join(f"{form} {times[kind][form]:.1f}" for form in FORMS)
                    lines.append(f"{case.id}: {kind} time in µs: {figures} (auto: {route.backend})")
            slow = {kind for kind in slow if beyond[kind] > 0}
            if not slow:
                break
    except (UnsupportedError, torch.cuda.OutOfMemoryError) as error:
        raise NotTimed(str(error)) from error
    return route.backend, beyond, lines


def main(argv: list[str] | None = None) -> int:
    """Print the figures; return 1 if "auto" is too slow somewhere, 2 without a GPU."""
    command = f"python -m {__package__}.auto"
    parser = Parser(command, description=__doc__, examples=f"{command} --matrix hot --family decode")
    parser.add_argument("--matrix", default="full", choices=("hot", "full"), help="the cases")
    parser.add_argument("--family", metavar="NAMES", help="only these, with commas (default: all but peers)")
    args = parser.parse_args(argv)
    try:
        asked = cases.matrix(args.matrix, family=args.family)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is timed", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    timer, chosen, worst, late = DeviceTimer(), Counter[str](), dict.fromkeys(KINDS, float("-inf")), []
    progress = Progress()
    progress.start("cases", len(asked))
    try:
        for case in asked:
            try:
                backend, beyond, lines = judge(case, timer)
            except NotTimed as reason:
                progress.say(f"{case.id}: not timed: {reason}")
            else:
                chosen[backend] += 1
                late += lines
                worst = {kind: max(worst[kind], beyond[kind]) for kind in KINDS}
                torch.cuda.empty_cache()
            progress.step()
    except KeyboardInterrupt:
        late.append("interrupted: the cases so far")
    print(*late, sep="\n")
    routes = ", ".join(f"{backend} in {n}" for backend, n in chosen.most_common())
    print(f'{gpu}, min-L {get_config().min_len_for(gpu)}: "auto" chose {routes} of {chosen.total()} cases')
    for kind in KINDS:
        print(f"{kind} time: at most {worst[kind]:+.1f} µs against the allowed 10 % + 2 µs over the better form")
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(exit_code(main))
