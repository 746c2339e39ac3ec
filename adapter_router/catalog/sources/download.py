"""An adapter's files from their place into a directory, in one piece or in many, and never mixed with others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

from adapter_router.catalog.adapter_files import (
    FILES,
    PICKLE,
    PICKLE_ADVICE,
    REQUIRED,
    WEIGHTS,
    combined_digest,
    largest,
    size_problem,
)
from adapter_router.catalog.sources.partial import Partial, PartialFile
from adapter_router.catalog.sources.place import Changed, Failing, Place, Progress, RemoteFile, Stream, refused
from adapter_router.config import SourceConfig

_LONGEST_PAUSE_S = 30.0
_WRITTEN = "its files are being written; wait until that is done"


class Download:
    """One download. ``files`` and ``file_digests`` (sha256 in hexadecimal), by name, are those of the last attempt."""

    def __init__(
        self, place: Place, partial: Partial, config: SourceConfig, max_bytes: int, progress: Progress | None = None
    ) -> None:
        """``max_bytes``: of the weights."""
        self._place = place
        self._partial = partial
        self._config = config
        self._max_bytes = max_bytes
        self._progress = progress
        self._failures = 0  # in a row that brought nothing
        self._present: dict[str, int] = {}
        self._most_kept = 0
        self.files: dict[str, RemoteFile] = {}
        self.file_digests: dict[str, str] = {}

    async def look(self) -> dict[str, RemoteFile]:
        """The files that are there. Raises AdapterRejected with every problem, Failing after ``attempts``."""
        while True:
            try:
                self.files = await self._look()
                return self.files
            except Failing as failure:
                await self._wait_after(failure)

    async def run(self) -> str:
        """Get what ``look`` saw, or whatever takes its place meanwhile; the digest of what is in the directory then.

        Raises AdapterRejected, and Failing when ``attempts`` in a row have brought nothing.
        """
        while True:
            try:
                await self._get(self.files)
                if await self._look() == self.files:
                    return combined_digest(self.file_digests)
                await self._wait_after(Failing(_WRITTEN))
            except Changed:
                await self._wait_after(Failing(_WRITTEN))
            except Failing as failure:
                kept = sum(size for name, size in self._present.items() if self.files[name].strong)
                if kept > self._most_kept:
                    self._most_kept, self._failures = kept, 0
                await self._wait_after(failure)
            await self.look()

    async def _look(self) -> dict[str, RemoteFile]:
        found = await self._place.files()
        problems = []
        for name in REQUIRED:
            if name not in found:
                problems.append(f"{name} is missing" + PICKLE_ADVICE * (name == WEIGHTS and PICKLE in found))
        files = {name: found[name] for name in FILES if name in found}
        sizes = {name: file.size for name, file in files.items() if file.size is not None}
        problems += [
            problem
            for name, size in sizes.items()
            if (problem := size_problem(name, size, self._max_bytes)) is not None
        ]
        if problems:
            raise refused(problems)
        return files

    async def _wait_after(self, failure: Failing) -> None:
        self._failures += 1
        if self._failures >= self._config.attempts or (failure.retry_after or 0.0) > _LONGEST_PAUSE_S:
            raise failure
        doubled = min(self._config.backoff_s * 2 ** (self._failures - 1), _LONGEST_PAUSE_S)
        await asyncio.sleep(max(doubled * random.uniform(0.5, 1.0), failure.retry_after or 0.0))

    async def _get(self, files: dict[str, RemoteFile]) -> None:
        self._partial.expect(files)
        self._present = dict.fromkeys(files, 0)
        self.file_digests = {}
        tasks = [asyncio.ensure_future(self._try_file(file, files)) for file in files.values()]
        try:
            failures = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for failure in failures:
            if failure is not None:
                raise failure

    async def _try_file(self, file: RemoteFile, files: Mapping[str, RemoteFile]) -> Failing | Changed | None:
        """What went wrong, where the other files are worth having all the same."""
        try:
            await self._get_file(file, files)
        except (Failing, Changed) as failure:
            return failure
        return None

    async def _get_file(self, file: RemoteFile, files: Mapping[str, RemoteFile]) -> None:
        with self._partial.open(file.name) as target:
            if file.size is not None and target.size > file.size:
                target.restart()
            if file.size is None or target.size != file.size or not file.strong:
                async with self._place.read(file, target.size) as stream:
                    await self._pour(stream, file, target, files)
            if file.size is not None and target.size != file.size:
                raise Failing(f"{file.name}: {target.size} of {file.size} bytes came")
            if file.sha256 is not None and target.sha256() != file.sha256:
                target.restart()
                raise Failing(f"{file.name}: what came is not what its place says it is (sha256)")
            self._note(file.name, target.size, files)
            self.file_digests[file.name] = target.sha256()

    async def _pour(
        self, stream: Stream, file: RemoteFile, target: PartialFile, files: Mapping[str, RemoteFile]
    ) -> None:
        if stream.offset != target.size:
            target.restart()
        if stream.size is not None and (problem := size_problem(file.name, stream.size, self._max_bytes)) is not None:
            raise refused([problem])
        limit = largest(file.name, self._max_bytes)
        async for chunk in stream.chunks:
            if target.size + len(chunk) > limit:
                raise refused([f"{file.name} has more than {limit} bytes, which is the limit"])
            target.append(chunk)
            self._note(file.name, target.size, files)
        if stream.size is not None and target.size != stream.size:
            raise Failing(f"{file.name}: {target.size} of {stream.size} bytes came")

    def _note(self, name: str, size: int, files: Mapping[str, RemoteFile]) -> None:
        self._present[name] = size
        if self._progress is not None:
            sizes = [file.size for file in files.values()]
            total = sum(size for size in sizes if size is not None) if None not in sizes else None
            self._progress(sum(self._present.values()), total)
