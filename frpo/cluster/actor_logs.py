"""Begin an actor's process where the run is: in the driver's folder, with its output in a file of the run's folder.

Ray keeps an actor's output on the actor's node, where it is lost with the node. A file in the run's folder, which all
nodes share, is where a user looks, and the driver can quote it when the actor has died.
"""
from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

FOLDER = "logs"
"""Name of the folder inside a run's folder."""

LINES, WIDTH = 8, 300
"""Most lines to quote, and most characters of each."""


def begin_in(folder: str, log: str | None) -> None:
    """Change to the driver's folder, where relative paths begin, if this node has it; append all output to `log`.

    log: a file, for the output of native code too; None: leave the output where it is.
    """
    with suppress(OSError):
        os.chdir(folder)
    if log is not None:
        _write_output_to(log)


def _write_output_to(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} on {socket.gethostname()}", file=sys.stderr,
          flush=True)


def last_lines(path: str) -> list[str]:
    """Return the last lines of a log; an empty list if the file is not on this machine."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LINES * WIDTH * 4))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line[:WIDTH].rstrip() for line in text.splitlines() if line.strip()]
    return lines[-LINES:]
