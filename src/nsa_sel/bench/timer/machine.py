"""What a run was measured on: the card's identity, the versions, and the session's calibration."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_calibration: dict[str, Any] = {}


def one_of_many() -> bool:
    """Tell whether a launcher such as torchrun started this process as a rank of a job."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def environment() -> dict[str, Any]:
    """Return gpu, gpu_id, driver, cuda, torch, triton (None where there is none) and the session's calibration."""
    return {**_identity(), "calibration": dict(_calibration)}


def set_calibration(values: dict[str, Any]) -> None:
    """Store the session's calibration, to be saved with the run."""
    _calibration.clear()
    _calibration.update(values)


@functools.cache
def _identity() -> dict[str, str | None]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found: dict[str, str | None] = {"gpu": None, "gpu_id": None, "driver": None, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = str(getattr(properties, "uuid", "")) or None
        found["gpu"] = properties.name
        # The hash tells cards apart without giving the card's serial away.
        found["gpu_id"] = None if uuid is None else hashlib.sha256(uuid.encode()).hexdigest()[:12]
        found["driver"] = _driver()
    return {**found, "torch": torch.__version__, "triton": triton_version}


def _driver() -> str | None:
    """Return the driver's version, e.g. "580.95.05"; None where neither the kernel module nor nvidia-smi tells it."""
    module = Path("/proc/driver/nvidia/version")
    if module.exists() and (match := re.search(r"(\d+\.\d+(?:\.\d+)?)\s", module.read_text())):
        return match[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split()[0] if answer.strip() else None
