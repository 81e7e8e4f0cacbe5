"""What this machine's NVIDIA driver says, asked of nvidia-smi so that no process of ours begins to use a GPU."""
from __future__ import annotations

import subprocess

OLDEST_DRIVER = {"12": 525, "13": 580}
"""Major version of CUDA -> of the oldest driver that runs it (NVIDIA's table of minor version compatibility)."""


def asked(*fields: str) -> list[tuple[str, ...]]:
    """The values of these fields (`nvidia-smi --help-query-gpu`), a tuple a GPU; nothing on a machine without one."""
    try:
        shown = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                               capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = shown.stdout.splitlines() if shown.returncode == 0 else []
    return [tuple(map(str.strip, line.split(","))) for line in lines if line.count(",") == len(fields) - 1]


def driver_version() -> str | None:
    """Of this machine's driver, such as "580.65.06", if it has one."""
    return next((version for (version,) in asked("driver_version") if version[:1].isdigit()), None)


def needed_driver(driver: str, cuda: str | None) -> int | None:
    """The oldest driver that runs a torch built with `cuda`, such as "13.0", where this one is older; None if not."""
    needed = OLDEST_DRIVER.get((cuda or "").split(".")[0], 0)
    return needed if int(driver.split(".")[0]) < needed else None


def smallest_memory() -> int | None:
    """Bytes of the smallest GPU of this machine; None without one."""
    return min((int(mib) * 2**20 for (mib,) in asked("memory.total") if mib.isdigit()), default=None)
