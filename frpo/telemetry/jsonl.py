"""Write and read append-only files of JSON lines: metrics, samples and traces."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from frpo.errors import CheckpointError
from frpo.storage import writing


class JsonlFile:
    """Append-only file with one JSON object per line, flushed line by line. A checkpoint records the file's size.

    JSON has no NaN and no infinity: both are written as null.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(row), allow_nan=False)
        with writing(self.path):
            self.file.write(line + "\n")
            self.file.flush()

    def offset(self) -> int:
        """Return the size of the file in bytes, all of them on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def truncate(self, offset: int) -> None:
        """Cut the file to `offset` bytes. Raises CheckpointError if the file is shorter than `offset`."""
        size = self.path.stat().st_size
        if size < offset:
            raise CheckpointError(
                f"{self.path} has {size} bytes, but had {offset} at this checkpoint: the file was changed, or the run "
                "went back to an earlier checkpoint; resume from an earlier one (run.resume=PATH) or choose another "
                "run.dir")
        self.file.truncate(offset)

    def close(self) -> None:
        with suppress(OSError):  # a line that found no room; `append` has said so
            self.file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JsonlFile. An incomplete last line, such as after a kill -9, is left out."""
    *whole, last = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in whole]
    with suppress(json.JSONDecodeError):
        rows.append(json.loads(last))
    return rows


def _finite(value: Any) -> Any:
    """Return the same value with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
