"""Copies an adapter's files and hashes them in one pass, also where somebody writes to them meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from adapter_router.catalog.adapter_files import FILES, ContentHash, escapes, largest, link_problem

_CHUNK_BYTES = 1 << 20


def copy_files(directory: Path, staging: Path, max_bytes: int) -> str:
    """Copy the files of ``directory``, a path without links, to ``staging``; returns the digest of what was copied.

    Raises OSError, and ValueError when a file is not what it was when the directory was checked.
    """
    hasher = ContentHash()
    for name in FILES:
        if (directory / name).exists():
            (staging / name).parent.mkdir(exist_ok=True)
            hasher.start_file(name)
            with _opened(name, directory) as source:
                _copy(source, staging / name, hasher, largest(name, max_bytes))
    return hasher.digest()


def _opened(name: str, directory: Path) -> BinaryIO:
    """The file ``name``, checked again."""
    actual = (directory / name).resolve()
    if escapes(actual, directory):
        raise ValueError(link_problem(name))
    # O_NONBLOCK: should it be a FIFO by now, fail instead of hanging.
    descriptor = os.open(actual, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    opened = os.fdopen(descriptor, "rb")
    descriptors = Path("/proc/self/fd")  # says what a descriptor leads to, whatever became of the way there
    if descriptors.exists() and (descriptors / str(descriptor)).readlink() != actual:
        opened.close()
        raise ValueError(f"{name} was replaced while it was copied; wait until that is done, and try again")
    return opened


def _copy(source: BinaryIO, target: Path, hasher: ContentHash, max_bytes: int) -> None:
    with target.open("xb") as writer:
        room = max_bytes
        while chunk := source.read(_CHUNK_BYTES):
            room -= len(chunk)
            if room < 0:
                raise ValueError(f"{target.name} grew beyond {max_bytes} bytes while it was copied")
            hasher.update(chunk)
            writer.write(chunk)
