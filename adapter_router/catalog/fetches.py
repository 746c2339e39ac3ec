"""Fetches in threads: a few at a time from each place, and no copy of theirs left lying."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from adapter_router.catalog.sources.address import parse
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import CatalogUnavailable
from adapter_router.types import Source

_AT_ONCE = 64
_OF_A_PLACE = 8  # one that hangs must not hold every thread


class Fetches:
    """Of one process. Lives on one event loop."""

    def __init__(self, fetcher: Fetcher, store: ContentStore) -> None:
        self._fetcher = fetcher
        self._store = store
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        # By scheme and host, or bucket; the whole hub is one place, and so is this machine.
        self._turns: defaultdict[tuple[str, str], asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_OF_A_PLACE)
        )
        self._running: set[asyncio.Future[StoredAdapter]] = set()

    def close(self) -> None:
        """Wait for nobody any more."""
        for fetching in self._running:
            fetching.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def copy(self, source: Source) -> AsyncIterator[StoredAdapter]:
        """What lies at ``source`` now, as a copy in the store; it goes again if the body raises why it is not wanted.

        It stays when the catalog did not answer, or nobody waits for the body: what that wrote may stand. Raises what
        ``Fetcher.fetch`` does.
        """
        stored = await self._fetch(source)
        keep = True
        try:
            yield stored
        except (CatalogUnavailable, asyncio.CancelledError):
            raise
        except BaseException:
            keep = False
            raise
        finally:
            await self._settle(stored, keep)

    async def _fetch(self, source: Source) -> StoredAdapter:
        address = parse(source)
        turn = self._turns[address.scheme, address.authority]
        await turn.acquire()
        fetching = asyncio.get_running_loop().run_in_executor(self._threads, self._fetcher.fetch, source)
        self._running.add(fetching)
        fetching.add_done_callback(self._running.discard)
        fetching.add_done_callback(lambda _: turn.release())  # no sooner: a thread cannot be called off
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            fetching.add_done_callback(self._forsake)
            raise

    def _forsake(self, fetching: asyncio.Future[StoredAdapter]) -> None:
        """Let a copy go that comes when nobody waits for it any more."""
        if not fetching.cancelled() and fetching.exception() is None:
            self._settle(fetching.result(), keep=False)

    def _settle(self, stored: StoredAdapter, keep: bool) -> asyncio.Future[None]:
        """In a thread: the store may have much to remove."""
        return asyncio.get_running_loop().run_in_executor(None, lambda: self._store.settle(stored, keep=keep))
