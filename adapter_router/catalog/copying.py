"""Copies an adapter's files and hashes them in one pass, also where somebody writes to them meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from adapter_router.catalog.adapter_files import (
    ContentHash,
    directory_problems,
    escapes,
    identity,
    largest,
    link_problem,
)
from adapter_router.catalog.location import resolve
from adapter_router.errors import AdapterRejected, AdapterUnavailable

_CHUNK_BYTES = 1 << 20
# Why a directory cannot be had for good; whatever else the system says, there is no room, or too many open files, or a
# disk does not answer just now.
_ITS_OWN = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
)
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


class Replaced(Exception):
    """A file was another than a moment ago; the next copy may be of one piece."""


def checked(source: str | os.PathLike[str], max_bytes: int, *, followed: bool) -> Path:
    """``source`` with its links followed; ``followed``: it must be without any.

    Raises AdapterRejected with every problem, OSError.
    """
    try:
        directory = Path(resolve(os.fspath(source)))
        problems = directory_problems(directory, max_bytes)
        actual = directory if problems else Path(os.path.realpath(directory))
    except ValueError as error:
        raise AdapterRejected.because([str(error)]) from error
    if followed and actual != directory:
        problems = [f"{directory} is a link by now; name the place that it leads to"]
    if problems:
        raise AdapterRejected.because(problems)
    return actual


def told(source: str | os.PathLike[str], error: OSError) -> AdapterRejected | AdapterUnavailable:
    """What kept ``source`` from being copied, and whether it may be otherwise the next time."""
    text = f"{os.fspath(source):.200} is not a directory that can be copied: {error.strerror}"
    return AdapterRejected.because([text]) if error.errno in _ITS_OWN else AdapterUnavailable(text)


def copy_files(directory: Path, staging: Path, max_bytes: int) -> str:
    """Copy the files of ``directory``, a path without links, to ``staging``; returns the digest of what was copied.

    Raises OSError, Replaced, and ValueError when a file now leads elsewhere or is too large.
    """
    hasher = ContentHash()
    before = identity(directory)
    for name, *_ in before:
        (staging / name).parent.mkdir(exist_ok=True)
        hasher.start_file(name)
        actual = Path(os.path.realpath(directory / name))  # which raises nothing for links in a circle
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
