"""Content-addressed store: private, immutable copies of adapter directories.

Adapters are never served from the directory a caller named: a file truncated under a memory map kills the process,
and one rewritten in place changes weights already loaded. A copy is staged, hashed while it is written, and moved
into place under its digest in one rename, so several processes of a node may share a store.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from adapter_router.catalog.location import resolve
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterFiles

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_HEAD_CONFIG = "config.json"
_MANIFEST = "adapter_router.json"
_INITIAL = "initial/adapter_model.safetensors"
_REQUIRED = (_CONFIG, _WEIGHTS)
_FILES = (*_REQUIRED, _HEAD_CONFIG, _MANIFEST, _INITIAL)
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 4 << 20  # a weights file's names take no room on a device
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's private copy: ``digest`` (``sha256:…``) of its files and the ``directory`` that holds them."""

    digest: str
    directory: Path

    def read(self) -> AdapterFiles:
        """The files' contents, verified against the digest.

        Raises AdapterUnavailable when the copy is gone or is no longer what was admitted.
        """
        try:
            paths = {name: self.directory / name for name in _FILES}
            files = {name: path.read_bytes() for name, path in paths.items() if name in _REQUIRED or path.exists()}
        except OSError as error:
            raise AdapterUnavailable(f"stored adapter {self.digest} cannot be read: {error.strerror}") from error
        hasher = _ContentHash()
        for name, content in files.items():
            hasher.start_file(name)
            hasher.update(content)
        if hasher.digest() != self.digest:
            raise AdapterUnavailable(f"stored adapter {self.digest} was changed on disk; load it again")
        return AdapterFiles(
            files[_CONFIG], files[_WEIGHTS], files.get(_HEAD_CONFIG), files.get(_MANIFEST), files.get(_INITIAL)
        )


class ContentStore:
    """Directory of adapters by digest; the only writer of what lies under ``root``. Thread-safe."""

    def __init__(self, root: Path, max_bytes: int = 1 << 40) -> None:
        """``max_bytes``: of one adapter's weights, ``adapter_memory_bytes``: no more fits on a device."""
        self.root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._undecided: Counter[str] = Counter()  # loads under way, by digest
        self._created: set[str] = set()  # copies made by loads that are under way
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def admit(self, source: str | os.PathLike[str]) -> StoredAdapter:
        """Copy the adapter directory ``source`` (or ``package:…``) into the store; the same content is kept once.

        The caller says with ``settle`` what became of it. Raises AdapterRejected with every problem of the directory
        itself.
        """
        try:
            directory = Path(resolve(os.fspath(source)))
            problems = _directory_problems(directory, self._max_bytes)
        except ValueError as error:
            problems = [str(error)]
        except OSError as error:
            problems = [f"{os.fspath(source):.200} is not a directory that can be read: {error.strerror}"]
        if problems:
            raise AdapterRejected.because(problems)
        staging = self._scratch()
        try:
            hasher = _ContentHash()
            for name in _FILES:
                if (directory / name).exists():
                    (staging / name).parent.mkdir(exist_ok=True)
                    hasher.start_file(name)
                    _copy(directory / name, staging / name, hasher)
            return self._publish(staging, hasher.digest())
        except OSError as error:
            raise AdapterRejected.because([f"{source} cannot be copied: {error.strerror}"]) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def settle(self, stored: StoredAdapter, *, keep: bool) -> None:
        """End one load of ``stored``. A copy that this process made and that nobody wants is removed."""
        with self._lock:
            self._undecided[stored.digest] -= 1
            if keep:
                self._created.discard(stored.digest)
            if self._undecided[stored.digest] > 0:
                return
            del self._undecided[stored.digest]
            if stored.digest in self._created:
                self._created.discard(stored.digest)
                refused = self._scratch()
                stored.directory.rename(refused)
                shutil.rmtree(refused, ignore_errors=True)

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root, prefix=".staging-"))

    def _publish(self, staging: Path, digest: str) -> StoredAdapter:
        stored = StoredAdapter(digest, self.root / digest.replace(":", "-"))
        with self._lock:
            self._undecided[digest] += 1
            try:
                staging.rename(stored.directory)
                self._created.add(digest)
            except OSError:
                if not stored.directory.is_dir():
                    raise
                self._replace_if_damaged(staging, stored)
        return stored

    def _replace_if_damaged(self, staging: Path, stored: StoredAdapter) -> None:
        try:
            stored.read()
        except AdapterUnavailable:
            damaged = self._scratch()
            stored.directory.rename(damaged)
            staging.rename(stored.directory)
            shutil.rmtree(damaged, ignore_errors=True)


class _ContentHash:
    """sha256 over file names and contents, framed so that no two directories share a stream."""

    def __init__(self) -> None:
        self._files: list[tuple[str, hashlib._Hash]] = []

    def start_file(self, name: str) -> None:
        self._files.append((name, hashlib.sha256()))

    def update(self, data: bytes) -> None:
        self._files[-1][1].update(data)

    def digest(self) -> str:
        listing = "".join(f"{name} {content.hexdigest()}\n" for name, content in self._files)
        return "sha256:" + hashlib.sha256(listing.encode()).hexdigest()


def _directory_problems(directory: Path, max_bytes: int) -> list[str]:
    if not directory.is_dir():
        return [f"{directory} is not a directory"]
    problems = []
    for name in _REQUIRED:
        if not (directory / name).exists():
            problems.append(f"{name} is missing" + _pickle_advice(directory, name))
    found = [_file_problem(name, directory, max_bytes) for name in _FILES if (directory / name).exists()]
    return problems + [problem for problem in found if problem is not None]


def _file_problem(name: str, directory: Path, max_bytes: int) -> str | None:
    status = (directory / name).stat()
    if _escapes(directory / name, directory):
        return f"{name} is a link to a place outside the directory; copy the file into it"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a regular file"
    if name in (_WEIGHTS, _INITIAL):
        fits = status.st_size <= max_bytes + _MAX_HEADER_BYTES
        return None if fits else f"{name} has {status.st_size} bytes, adapter_memory_bytes is {max_bytes}"
    if status.st_size > _MAX_CONFIG_BYTES:
        return f"{name} has {status.st_size} bytes, the limit is {_MAX_CONFIG_BYTES}"
    return None


def _escapes(path: Path, directory: Path) -> bool:
    """Whether following links leads out of ``directory``; a hub cache's snapshots keep their files under ``blobs``."""
    home = directory.resolve()
    allowed = [home]
    for folder in (home, *home.parents):
        blobs = folder.parent.parent / "blobs"
        if folder.parent.name == "snapshots" and not blobs.is_symlink():
            allowed.append(blobs)
    actual = path.resolve()
    return not any(actual.is_relative_to(root) for root in allowed)


def _pickle_advice(directory: Path, name: str) -> str:
    if name == _WEIGHTS and (directory / "adapter_model.bin").exists():
        return "; adapter_model.bin is a pickle and is never read: save it again with safe_serialization=True"
    return ""


def _copy(source: Path, target: Path, hasher: _ContentHash) -> None:
    # O_NONBLOCK: should the path have become a FIFO since it was checked, fail instead of hanging.
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            hasher.update(chunk)
            writer.write(chunk)
