"""Holds on directories, seen by every process of a node: what is held is neither evicted nor tidied away.

A hold is an advisory lock on the directory itself (flock), which the system ends with the process, however that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path


class Hold:
    """A lock that lasts until ``release``, or until nobody refers to it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._release = weakref.finalize(self, os.close, descriptor)

    def is_of(self, path: Path) -> bool:
        """Whether what is held, and not released yet, still lies at ``path``."""
        return _is_there(self._descriptor, path)

    def release(self) -> None:
        self._release()


def hold(directory: Path) -> Hold | None:
    """Keep ``directory`` from being removed, as any number of others may; None when it is not there."""
    while True:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while somebody moves it away, which is one rename
            if _is_there(descriptor, directory):
                return Hold(os.dup(descriptor))
        finally:
            os.close(descriptor)


def take(path: Path) -> Hold | None:
    """Have the file or directory ``path`` alone; None when somebody holds it or it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Hold(os.dup(descriptor)) if _is_there(descriptor, path) else None
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Have a turn at what ``path``, a file of nobody else's, stands for: one at a time, threads and processes."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still leads to what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
