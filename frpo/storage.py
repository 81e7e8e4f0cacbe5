"""Name the file and the room that is left where a write fails, as on a full disk."""
from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frpo.errors import FrpoError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
WRITERS = re.compile(r"inline_container|PytorchStreamWriter|I/O error")
"""Pattern of the messages with which torch and safetensors report a failed write; both lose the error's number."""


@contextmanager
def writing(path: Path, remedy: str = "Make room there, or choose another run.dir") -> Iterator[None]:
    """Raise StorageError where a write within the context fails. path: its file or folder. remedy: what to change."""
    try:
        yield
    except Exception as error:  # torch and safetensors raise errors of their own for a failed write
        if isinstance(error, FrpoError) or not _is_failed_write(error):
            raise
        raise StorageError(f"{path} cannot be written ({_reason(error)}); {_free(path)} are free there. {remedy}"
                           ) from error


def full_disk(error: OSError) -> StorageError | None:
    """Return the error to show if a write outside of `writing` found no room. Return None for another error."""
    if error.errno not in FULL:
        return None
    places = list(dict.fromkeys(map(Path, [error.filename or ".", tempfile.gettempdir(), "/dev/shm"])))
    return StorageError(f"a file cannot be written ({_reason(error)}); free are "
                        + ", ".join(f"{_free(place)} at {place.absolute()}" for place in places) + ". Make room there")


def _is_failed_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    return WRITERS.search(str(error)) is not None


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _free(path: Path) -> str:
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.0f} MiB"
