"""A download's files as far as they have come, on the store's disk: the next attempt goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from adapter_router.catalog.adapter_files import FILES
from adapter_router.catalog.holds import take
from adapter_router.catalog.sources.place import RemoteFile
from adapter_router.catalog.store_index import bytes_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KEPT_S = 24 * 3600.0
_CHUNK_BYTES = 1 << 20


class Partial:
    """The files of one source. ``files`` holds them and nothing else."""

    def __init__(self, home: Path) -> None:
        self.files = home / "files"
        self._state = home / "state.json"
        self._known = self._read_state()

    def expect(self, files: dict[str, RemoteFile]) -> None:
        """These are the files to get: keep what is here of them, remove everything else."""
        for path in sorted(self.files.rglob("*"), reverse=True):
            name = path.relative_to(self.files).as_posix()
            if path.is_dir() and not path.is_symlink():
                continue
            if name not in files or not files[name].strong or self._known.get(name) != asdict(files[name]):
                path.unlink()
        self._known = {name: asdict(file) for name, file in files.items()}
        self.files.mkdir(parents=True, exist_ok=True)
        if not any(name.startswith("initial/") for name in files):
            shutil.rmtree(self.files / "initial", ignore_errors=True)
        written = self._state.with_suffix(".new")
        written.write_text(json.dumps({"boot": _boot_id(), "files": self._known}))
        written.replace(self._state)

    def open(self, name: str) -> PartialFile:
        assert name in FILES
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return PartialFile(path)

    def forget(self) -> None:
        shutil.rmtree(self.files.parent, ignore_errors=True)

    def _read_state(self) -> dict[str, object]:
        try:
            state = json.loads(self._state.read_text())
            # A machine that lost its power may have kept a file's length and not its bytes.
            return dict(state["files"]) if state["boot"] == _boot_id() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


class PartialFile:
    """A file that grows at its end, hashed as it does."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)  # what is written stays when the process is killed
        self._sha256 = hashlib.sha256()
        self.size = 0
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK_BYTES):
            self._sha256.update(chunk)
            self.size += len(chunk)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            self._sha256.update(view[:written])
            self.size += written
            view = view[written:]

    def restart(self) -> None:
        self._file.truncate(0)
        self._sha256 = hashlib.sha256()
        self.size = 0

    def sha256(self) -> str:
        return self._sha256.hexdigest()


def tidy(homes: Path, budget_bytes: int | None) -> None:
    """Remove downloads that nobody goes on with: those a day old, and the oldest where all are over a quarter."""
    found = [(modified, home) for home in homes.glob("*") if (modified := _modified(home)) is not None]
    room = (budget_bytes or 1 << 62) // 4
    for modified, home in sorted(found, reverse=True):
        room -= bytes_of(home / "files")
        if modified < time.time() - _KEPT_S or room < 0:
            taken = take(home)  # whoever is at it has it
            if taken is not None:
                shutil.rmtree(home, ignore_errors=True)


def _modified(home: Path) -> float | None:
    """When; None where others have finished with it meanwhile."""
    try:
        return home.stat().st_mtime
    except FileNotFoundError:
        return None


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None
