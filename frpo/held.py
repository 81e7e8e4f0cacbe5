"""Files and folders that a process holds until its death, by a lock that the kernel then releases (flock).

A process that can take the lock can be sure that the earlier holder is gone. This also holds for a holder in another
PID namespace (two containers), and on another machine if the file system supports locks there. No function here waits
for a lock.
"""
from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from frpo.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Error numbers of a file system without locks, such as some network file systems."""


class HeldByAnotherError(Exception):
    """Another process holds the file. The text of the error names that process."""


class HeldFile:
    """A file that this process holds, with a line about the process in it."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file

    @classmethod
    def take(cls, path: Path) -> HeldFile:
        """Make the file, or take over a file whose holder has died.

        Raises HeldByAnotherError. Raises OSError if the file cannot be made or locked.
        """
        while True:
            # Do not follow a link: in /dev/shm any user may have made one, and the held file is written to.
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = file.read().strip() or "another process"
                file.close()
                raise HeldByAnotherError(holder) if isinstance(error, BlockingIOError) else error from None
            if _is_at(file, path):
                break
            file.close()  # the holder removed the file after this `open`: other processes would open a new file
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        return cls(path, file)

    def remove(self) -> None:
        """Delete the file and release the lock. Delete no other file at the path, in case the folder was moved."""
        if _is_at(self.file, self.path):
            self.path.unlink(missing_ok=True)
        self.file.close()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the file within the context; delete the file afterwards.

    On a file system without locks, log a warning and hold nothing. Raises HeldByAnotherError. Raises OSError if the
    file cannot be made.
    """
    lock = None
    try:
        lock = HeldFile.take(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: the file system has no locks (%s), so a second run into this folder would not be "
                       "refused", path.parent, error.strerror)
    try:
        yield
    finally:
        if lock:
            lock.remove()


@contextmanager
def held_folder(folder: Path, key: str = "run.dir") -> Iterator[None]:
    """Hold the folder within the context, so that no other run writes into it. Make the folder if it does not exist.

    key: the recipe key that names the folder. Raises ConfigError if another run is writing into the folder, or if the
    folder cannot be written.
    """
    with ExitStack() as stack:
        if not folder.is_dir():
            stack.callback(_remove_if_empty, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / LOCK))
        except HeldByAnotherError as holder:
            raise ConfigError(f"{key}: another run is writing into {folder} ({holder}); wait for it, end it, or give "
                              f"another {key}") from None
        except OSError as error:
            raise ConfigError(f"{key}: {folder} cannot be written ({error.strerror}); give another {key}") from None
        yield


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote a file."""
    with suppress(OSError):
        folder.rmdir()


def _is_at(file: TextIO, path: Path) -> bool:
    """Return whether the open file is the file at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
