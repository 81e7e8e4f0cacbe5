"""Query this machine's NVIDIA driver through nvidia-smi, so that no process of frpo begins to use a GPU."""
from __future__ import annotations

import subprocess

OLDEST_DRIVER = {"12": 525, "13": 580}
"""Major version of CUDA -> major version of its oldest driver (NVIDIA's table of minor version compatibility)."""


def asked(*fields: str) -> list[tuple[str, ...]]:
    """Return the values of these fields (`nvidia-smi --help-query-gpu`), one tuple for each GPU; [] without a GPU."""
    try:
        shown = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                               capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = shown.stdout.splitlines() if shown.returncode == 0 else []
    return [tuple(map(str.strip, line.split(","))) for line in lines if line.count(",") == len(fields) - 1]


def driver_version() -> str | None:
    """Return the version of this machine's NVIDIA driver, such as "580.65.06"; None without a driver."""
    return next((version for (version,) in asked("driver_version") if version[:1].isdigit()), None)


def needed_driver(driver: str, cuda: str | None) -> int | None:
    """Return the major version of the oldest driver for torch built with `cuda`, such as "13.0".

    Return None if `driver` is new enough.
    """
    needed = OLDEST_DRIVER.get((cuda or "").split(".")[0], 0)
    return needed if int(driver.split(".")[0]) < needed else None


def smallest_memory() -> int | None:
    """Return the bytes of memory of this machine's smallest GPU; None without a GPU."""
    return min((int(mib) * 2**20 for (mib,) in asked("memory.total") if mib.isdigit()), default=None)
