"""Copies an adapter's files and hashes them in one pass, also where somebody writes to them meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from adapter_router.catalog.adapter_files import ContentHash, escapes, identity, largest, link_problem

_CHUNK_BYTES = 1 << 20
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


class Replaced(Exception):
    """A file was another than a moment ago; the next copy may be of one piece."""


def copy_files(directory: Path, staging: Path, max_bytes: int) -> str:
    """Copy the files of ``directory``, a path without links, to ``staging``; returns the digest of what was copied.

    Raises OSError, Replaced, and ValueError when a file now leads elsewhere or is too large.
    """
    hasher = ContentHash()
    before = identity(directory)
    for name, *_ in before:
        (staging / name).parent.mkdir(exist_ok=True)
        hasher.start_file(name)
        actual = (directory / name).resolve()
        if escapes(actual, directory):
            raise ValueError(link_problem(name))
        with _open_without_links(actual) as source:
            _copy(source, staging / name, hasher, largest(name, max_bytes))
    if identity(directory) != before:
        raise Replaced
    return hasher.digest()


def _open_without_links(path: Path) -> BinaryIO:
    """``path`` has been followed to its end; what has become a link since then leads nobody anywhere."""
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: should it be a FIFO by now, fail instead of hanging.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.fdopen(os.open(path.name, flags, dir_fd=folder), "rb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            raise Replaced from error
        raise
    finally:
        os.close(folder)


def _copy(source: BinaryIO, target: Path, hasher: ContentHash, max_bytes: int) -> None:
    with target.open("xb") as writer:
        room = max_bytes
        while chunk := source.read(_CHUNK_BYTES):
            room -= len(chunk)
            if room < 0:
                raise ValueError(f"{target.name} grew beyond {max_bytes} bytes while it was copied")
            hasher.update(chunk)
            writer.write(chunk)
