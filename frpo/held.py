"""Files and folders that a process holds for as long as it lives, by a lock that the kernel drops at its death (flock).

Whoever can take the lock therefore knows that the holder is gone: also one in another PID namespace (two containers),
and one on another machine where the file system carries locks. Nothing here waits for a lock.
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
"""What a file system answers that has no locks, such as some network file systems."""


class HeldByAnotherError(Exception):
    """Another process, which its text names, holds the file."""


class HeldFile:
    """A file that this process holds, with a line about the process in it."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file

    @classmethod
    def take(cls, path: Path) -> HeldFile:
        """Make the file, or take over one whose holder has died.

        Raises HeldByAnotherError, and OSError where the file cannot be made or locked.
        """
        while True:
            # Not through a link: in /dev/shm anybody may have laid one, and what is taken is written to.
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = file.read().strip() or "another process"
                file.close()
                raise HeldByAnotherError(holder) if isinstance(error, BlockingIOError) else error from None
            if _is_at(file, path):
                break
            file.close()  # its holder has removed it since it was opened: it is no longer what others would open
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        return cls(path, file)

    def remove(self) -> None:
        """Delete the file and let go of it. Where its folder was moved, another may by now hold the one at its path."""
        if _is_at(self.file, self.path):
            self.path.unlink(missing_ok=True)
        self.file.close()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Within it this process holds the file, which is gone afterwards.

    On a file system without locks it warns and holds nothing. Raises HeldByAnotherError, and OSError where the file
    cannot be made.
    """
    lock = None
    try:
        lock = HeldFile.take(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: the file system has no locks (%s), so that a second run into this folder would not be "
                       "refused", path.parent, error.strerror)
    try:
        yield
    finally:
        if lock:
            lock.remove()


@contextmanager
def held_folder(folder: Path, key: str = "run.dir") -> Iterator[None]:
    """Within it no other run writes into the folder, which is made if it is not there. key: what names it in a recipe.

    Raises ConfigError if another run writes into it, or if nobody can.
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
    """For the folder of a run that was refused before it wrote anything."""
    with suppress(OSError):
        folder.rmdir()


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
