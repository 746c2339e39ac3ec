"""The files an adapter may have, how large each may be, and the digest of their contents."""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD_CONFIG = "config.json"
MANIFEST = "adapter_router.json"
INITIAL = "initial/adapter_model.safetensors"
REQUIRED = (CONFIG, WEIGHTS)
FILES = (*REQUIRED, HEAD_CONFIG, MANIFEST, INITIAL)
PICKLE = "adapter_model.bin"
PICKLE_ADVICE = f"; {PICKLE} is a pickle and is never read: save it again with safe_serialization=True"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 4 << 20  # a weights file's names take no room on a device


class ContentHash:
    """sha256 over file names and contents, framed so that no two directories share a stream."""

    def __init__(self) -> None:
        self._files: list[tuple[str, hashlib._Hash]] = []

    def start_file(self, name: str) -> None:
        self._files.append((name, hashlib.sha256()))

    def update(self, data: bytes) -> None:
        self._files[-1][1].update(data)

    def digest(self) -> str:
        return combined_digest({name: content.hexdigest() for name, content in self._files})


def combined_digest(hex_digests: Mapping[str, str]) -> str:
    """An adapter's digest, ``sha256:…``, from the sha256 of each of its files."""
    listing = "".join(f"{name} {hex_digests[name]}\n" for name in FILES if name in hex_digests)
    return "sha256:" + hashlib.sha256(listing.encode()).hexdigest()


def size_problem(name: str, size: int, max_bytes: int) -> str | None:
    """Why the file ``name`` may not have ``size`` bytes, where weights may have ``max_bytes``."""
    if size <= largest(name, max_bytes):
        return None
    return f"{name} has {size} bytes, the limit is {max_bytes if name in (WEIGHTS, INITIAL) else _MAX_CONFIG_BYTES}"


def largest(name: str, max_bytes: int) -> int:
    """How many bytes the file ``name`` may have at most, where weights may have ``max_bytes``."""
    return max_bytes + _MAX_HEADER_BYTES if name in (WEIGHTS, INITIAL) else _MAX_CONFIG_BYTES


def directory_problems(directory: Path, max_bytes: int) -> list[str]:
    """Why ``directory`` cannot be copied: files that are missing, too large, not files, or elsewhere."""
    if not directory.is_dir():
        return [f"{directory} is not a directory"]
    problems = []
    for name in REQUIRED:
        if not (directory / name).exists():
            has_pickle = name == WEIGHTS and (directory / PICKLE).exists()
            problems.append(f"{name} is missing" + PICKLE_ADVICE * has_pickle)
    found = [_file_problem(name, directory, max_bytes) for name in FILES if (directory / name).exists()]
    return problems + [problem for problem in found if problem is not None]


def identity(directory: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """What changes when a file of ``directory`` is written or replaced: name, inode, bytes and times of each.

    The time of its last change too, which nobody can set back: ``rsync --times`` and ``cp -p`` set that of the content.
    """
    found = []
    for name in FILES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = (directory / name).stat()
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def _file_problem(name: str, directory: Path, max_bytes: int) -> str | None:
    status = (directory / name).stat()
    if escapes((directory / name).resolve(), directory.resolve()):
        return link_problem(name)
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a regular file"
    return size_problem(name, status.st_size, max_bytes)


def link_problem(name: str) -> str:
    return f"{name} is a link to a place outside the directory; copy the file into it"


def escapes(path: Path, home: Path) -> bool:
    """Whether ``path`` is outside ``home``, links followed in both; a hub cache has a snapshot's files in ``blobs``."""
    allowed = [home]
    for folder in (home, *home.parents):
        blobs = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and not blobs.is_symlink():
            allowed.append(blobs)
    return not any(path.is_relative_to(root) for root in allowed)
