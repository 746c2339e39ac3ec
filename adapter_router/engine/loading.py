"""Cold adapters: fetched and read in lanes by source, then checked and converted, a few at once, in host memory."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from adapter_router.adapters.validate import Request
from adapter_router.catalog.store import StoredAdapter
from adapter_router.engine.activity import Activity
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.lanes import Lanes
from adapter_router.engine.placing import place
from adapter_router.engine.reading import Loaded, Obtain, Reader, request_of
from adapter_router.engine.refusals import Key, Refusals
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import AdapterRejected, AdapterRouterError, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 5e-4
"""For ``sys.setswitchinterval`` of a process that serves.

A forward wants the interpreter back after every operator, and a thread that loads keeps it for so long: Python's 5 ms,
by default, of which a tenth costs others' rows less while adapters load. A hundredth costs them more again, for all the
switching (compare ``python -m benchmarks.cold_loads --switch-interval``).
"""

_READS_AHEAD = 2  # of each lane: files that are read while others are converted
_FETCHES = 4  # of one source at once
_MOST_FETCHES = 64
_CLOSING_S = 5.0

Fits = Callable[[int, bool], Sequence[str]]
"""Why an adapter, or a mix, of so many bytes can never be on the device."""


@dataclass(frozen=True)
class Arrival:
    """An adapter in host memory, in its device form; ``seconds`` that it took, waiting for others not counted."""

    adapter: ResidentAdapter
    loaded: Loaded
    seconds: float


class Loading:
    """Loader threads. One load that hangs, fails or takes long delays no other source's."""

    def __init__(
        self,
        base: BaseModel,
        obtain: Obtain,
        threads: int,
        fits: Fits,
        activity: Activity,
        metrics: EngineMetrics,
    ) -> None:
        """``threads``: adapters checked and converted at once; one mix beside them."""
        self._base = base
        self._reader = Reader(base, obtain)
        self._fits = fits
        self._activity = activity
        self._metrics = metrics
        self._near = Lanes("adapter-loader", threads + _READS_AHEAD, 3 * (threads + _READS_AHEAD))
        self._far = Lanes("adapter-fetcher", _FETCHES, _MOST_FETCHES)
        self._adapters, self._mixes = threading.Semaphore(threads), threading.Semaphore(1)
        self._refusals = Refusals()

    def check(self, version: AdapterVersion) -> None:
        """Raise what the last attempt to load ``version`` came to, where another would come to the same."""
        for key in _keys(version):
            self._refusals.check(key)

    def load(self, version: AdapterVersion, finish: Callable[[Arrival], None]) -> Future[None]:
        """Load an adapter or a mix and hand it to ``finish``, in a thread of the load's own lane."""

        def run() -> None:
            with self._activity.loading():
                arrival = self._timed(*_keys(version), lambda: self._read(version))
            finish(arrival)

        kind = "mix" if version.parts else "adapter"
        origins = {_origin(part.version) for part in version.parts} if version.parts else {_origin(version)}
        away = sorted(origins - {""})
        return self._far.submit(f"{kind} {away[0]}", run) if away else self._near.submit(kind, run)

    def admit(self, stored: StoredAdapter, request: Request, finish: Callable[[Arrival], None]) -> Future[Loaded]:
        """Load what has been stored, and tell what it is. Raises AdapterRejected when it was refused before."""
        content = (stored.digest, request)
        self._refusals.check(content)

        def read() -> tuple[ResidentAdapter, Loaded]:
            files = stored.read()
            with self._adapters:
                return self._placed(stored.digest, self._reader.read(files, request))

        def run() -> Loaded:
            arrival = self._timed(content, None, read)
            finish(arrival)
            return arrival.loaded

        return self._near.submit("adapter", run)

    def again(self, work: Callable[[], None]) -> Future[None]:
        """Run what needs no reading, only room."""
        return self._near.submit("room", work)

    def close(self) -> None:
        """Stop; what hangs is left behind."""
        self._near.close(_CLOSING_S)
        self._far.close(0.0)

    def _read(self, version: AdapterVersion) -> tuple[ResidentAdapter, Loaded]:
        if problems := self._fits(version.num_bytes, bool(version.parts)):
            raise AdapterRejected.because(problems)
        files = self._reader.fetch(version)
        with self._mixes if version.parts else self._adapters:
            return self._placed(version.digest, self._reader.read_version(version, files))

    def _placed(self, digest: str, loaded: Loaded) -> tuple[ResidentAdapter, Loaded]:
        if problems := self._fits(loaded.num_bytes, bool(loaded.parts)):
            raise AdapterRejected.because(problems)
        return place(digest, loaded, self._base), loaded

    def _timed(self, content: Key, attempt: Key | None, read: Callable[[], tuple[ResidentAdapter, Loaded]]) -> Arrival:
        """``read``; its failure is counted and remembered, for good under ``content`` or for a while under ``attempt``.

        Raises AdapterRouterError and nothing else.
        """
        start = time.perf_counter()
        try:
            adapter, loaded = read()
        except AdapterRouterError as error:
            self._failed(content, attempt, error)
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            logger.exception("loading adapter %s failed", content[0])
            told = f"loading the adapter failed: {type(error).__name__}"
            raise self._failed(content, attempt, InternalError(told)) from error
        self._refusals.arrived(content[0])
        return Arrival(adapter, loaded, time.perf_counter() - start)

    def _failed(self, content: Key, attempt: Key | None, error: AdapterRouterError) -> AdapterRouterError:
        self._metrics.load_failed(error)
        key = content if isinstance(error, AdapterRejected) else attempt
        if key is not None:
            self._refusals.failed(key, error)
        return error


def _keys(version: AdapterVersion) -> tuple[Key, Key]:
    """By which it is remembered that a version is refused for good, and that it could not be had."""
    # What is wrong with a mix is told by the names of its parts, which others may call otherwise.
    content = version.adapter if version.parts else request_of(version)
    # What is not to be had under one name, from one source, may be under another.
    return (version.digest, content), (version.digest, version)


def _origin(version: AdapterVersion) -> str:
    """Whom a load waits for: nobody where a copy is on this node."""
    if version.source is None or (version.directory is not None and Path(version.directory).is_dir()):
        return ""
    place = urlsplit(version.source.uri)
    return f"{place.scheme}://{place.netloc if place.scheme != 'hf' else ''}"
