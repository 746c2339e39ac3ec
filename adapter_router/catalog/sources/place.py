"""A place that adapters are downloaded from: what every kind of them can do, and how they fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from adapter_router.errors import AdapterRejected

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and, where the source says, the bytes there will be."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its place tells of it, before it is read.

    ``tag``: something else once the file is another; ``strong``: the same only while every byte is. ``size``: None
    where the place does not say. ``sha256``: where it says that, too.
    """

    name: str
    size: int | None
    tag: str
    strong: bool
    sha256: str | None = None


@dataclass(frozen=True)
class Stream:
    """A file's bytes from ``offset`` on; ``size`` is the whole file's."""

    offset: int
    size: int | None
    chunks: AsyncIterator[bytes]


class Place(Protocol):
    """One adapter's folder somewhere else. Used inside one event loop, by one task or several."""

    async def files(self) -> Mapping[str, RemoteFile]:
        """Those of an adapter's files that are there, and a pickle in the place of the weights.

        Raises AdapterRejected, Failing.
        """

    def read(self, file: RemoteFile, start: int) -> AbstractAsyncContextManager[Stream]:
        """The bytes of ``file`` from ``start`` on, or from an earlier one on. Raises as ``files``, and Changed."""


class Failing(Exception):
    """It did not work and may work later; the text says what happened. ``retry_after``: seconds, if the place says."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Changed(Exception):
    """A file is no longer the one that was asked for."""


def refused(problems: Iterable[str]) -> AdapterRejected:
    return AdapterRejected.because(list(problems))
