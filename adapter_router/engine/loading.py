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
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.lanes import Lanes
from adapter_router.engine.placing import place
from adapter_router.engine.reading import Loaded, Obtain, Reader, request_of
from adapter_router.engine.refusals import Refusals
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import AdapterRejected, AdapterRouterError, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion

logger = logging.getLogger(__name__)

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

    def __init__(self, base: BaseModel, obtain: Obtain, threads: int, fits: Fits, metrics: EngineMetrics) -> None:
        """``threads``: adapters checked and converted at once; one mix beside them."""
        self._base = base
        self._reader = Reader(base, obtain)
        self._fits = fits
        self._metrics = metrics
        self._near = Lanes("adapter-loader", threads + _READS_AHEAD, 3 * (threads + _READS_AHEAD))
        self._far = Lanes("adapter-fetcher", _FETCHES, _MOST_FETCHES)
        self._adapters, self._mixes = threading.Semaphore(threads), threading.Semaphore(1)
        self._refusals = Refusals()

    def load(self, version: AdapterVersion, finish: Callable[[Arrival], None]) -> Future[None]:
        """Load an adapter or a mix and hand it to ``finish``, in a thread of the load's own lane.

        Raises what the last attempt came to, where another would come to the same.
        """
        # What is wrong with a mix is told by the names of its parts, which others may call otherwise.
        key = (version.digest, version.adapter if version.parts else request_of(version))
        self._refusals.check(key)

        def run() -> None:
            finish(self._timed(key, lambda: self._read(version)))

        kind = "mix" if version.parts else "adapter"
        origins = {_origin(part.version) for part in version.parts} if version.parts else {_origin(version)}
        away = sorted(origins - {""})
        return self._far.submit(f"{kind} {away[0]}", run) if away else self._near.submit(kind, run)

    def admit(self, stored: StoredAdapter, request: Request, finish: Callable[[Arrival], None]) -> Future[Loaded]:
        """Load what has been stored, and tell what it is. Raises AdapterRejected when it was refused before."""
        key = (stored.digest, request)
        self._refusals.check(key, for_good=True)  # what was not to be had may be, now that it has been stored

        def read() -> tuple[ResidentAdapter, Loaded]:
            files = stored.read()
            with self._adapters:
                return self._placed(stored.digest, self._reader.read(files, request))

        def run() -> Loaded:
            arrival = self._timed(key, read)
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

    def _timed(self, key: tuple[str, object], read: Callable[[], tuple[ResidentAdapter, Loaded]]) -> Arrival:
        """``read``, whose failure is counted and remembered under ``key``."""
        start = time.perf_counter()
        try:
            adapter, loaded = read()
        except AdapterRouterError as error:
            self._metrics.load_failed(error)
            self._refusals.failed(key, error)
            raise
        except Exception as error:
            logger.exception("loading adapter %s failed", key[0])
            failure = InternalError(f"loading the adapter failed: {type(error).__name__}")
            self._metrics.load_failed(failure)
            self._refusals.failed(key, failure)
            raise failure from error
        self._refusals.succeeded(key)
        return Arrival(adapter, loaded, time.perf_counter() - start)


def _origin(version: AdapterVersion) -> str:
    """Whom a load waits for: nobody where a copy is on this node."""
    if version.source is None or (version.directory is not None and Path(version.directory).is_dir()):
        return ""
    place = urlsplit(version.source.uri)
    return f"{place.scheme}://{place.netloc if place.scheme != 'hf' else ''}"
