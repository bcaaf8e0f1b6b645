"""What the parity suite prints at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nsa_sel.bench.suite.kernels import UserKernel

COMPARED, LEFT_OUT = "compared", "left out"  # names of a report's properties
OURS = "the Triton kernel"
REASONS_SHOWN = 5


def write(terminal: pytest.TerminalReporter, given: Sequence[UserKernel], deselected: Sequence[str]) -> None:
    """Write for each kernel under test what was compared and with which figures; of given ones what did not run too."""
    passed = [report for report in terminal.getreports("passed") if report.when == "call"]
    records = _properties(passed, COMPARED)
    on_gpu = torch.cuda.is_available()
    if records and not given:
        where = f"real kernels on {torch.cuda.get_device_name()}" if on_gpu else "Triton's interpreter, no GPU"
        terminal.section(f"parity of {OURS}")
        variants = {r["variant"] for r in records}
        terminal.line(f"{len(records)} comparisons with {where}; {len(variants)} kernel variants")
        _figures(terminal, records)
    for kernel in given:
        of_kernel = [r for r in records if r["kernel"] == kernel.name]
        where = torch.cuda.get_device_name() if on_gpu else "the CPU, no GPU"
        terminal.section(f"parity of {kernel.name}")
        terminal.line(
            f"{kernel.spec}, takes {kernel.takes}: {len(of_kernel)} comparisons on {where}", red=not of_kernel
        )
        _figures(terminal, of_kernel)
        said = [r.longrepr[2].removeprefix("Skipped: ") for r in terminal.getreports("skipped")]
        _count(terminal, kernel, said, "tests skipped")
        _count(terminal, kernel, _properties(passed, LEFT_OUT), "drawn cases left out")
    for line in deselected:
        terminal.line(line)


def _properties(reports: Sequence[Any], wanted: str) -> list[Any]:
    return [value for report in reports for name, value in report.user_properties if name == wanted]


def _figures(terminal: pytest.TerminalReporter, records: Sequence[dict[str, Any]]) -> None:
    for dtype in sorted({r["dtype"] for r in records}):
        of_dtype = [r for r in records if r["dtype"] == dtype]
        ordinary = [r for r in of_dtype if r["q_factor"] == 1] or of_dtype
        mae = max(ordinary, key=lambda r: r["mae"])
        worst = max(ordinary, key=lambda r: r["max_err"])
        row = max(of_dtype, key=lambda r: r["row_mae_ratio"])
        terminal.line(f"{dtype}: worst MAE {mae['mae']:.3g} in {mae['label']}")
        terminal.line(f"{'':14} worst max error {worst['max_err']:.3g} in {worst['label']}")
        terminal.line(f"{'':14} worst row MAE at {row['row_mae_ratio']:.0%} of its bound in {row['label']}")


def _count(terminal: pytest.TerminalReporter, kernel: UserKernel, said: Sequence[str], what: str) -> None:
    """Write how often the kernel said which reason; all that it says begins with its name."""
    own = f"{kernel.name}: "
    reasons = Counter(text.removeprefix(own) for text in said if text.startswith(own)).most_common()
    for reason, n in reasons[:REASONS_SHOWN]:
        terminal.line(f"{what} ({n}): {reason}")
    if others := sum(n for _, n in reasons[REASONS_SHOWN:]):
        terminal.line(f"{what} ({others}): other reasons")
