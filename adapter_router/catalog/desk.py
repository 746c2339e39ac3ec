"""The catalog's methods called from an event loop: in threads, and nobody who only looks waits for those who write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from adapter_router.errors import CatalogUnavailable

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_READERS = 4
_WRITERS = 4  # one writes, the others are on their way there


class Desk:
    """Of one process. Lives on one event loop."""

    def __init__(self, changed: Callable[[], Awaitable[None]]) -> None:
        """``changed`` is awaited after every write, so that this process sees what it wrote at once."""
        self._changed = changed
        self._reading = ThreadPoolExecutor(_READERS, thread_name_prefix="catalog")
        self._writing = ThreadPoolExecutor(_WRITERS, thread_name_prefix="catalog-writes")

    async def close(self) -> None:
        """Begin nothing any more."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown(wait=False, cancel_futures=True)

    async def read(self, method: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call a method that changes nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, lambda: method(*args, **kwargs))

    async def write(self, method: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call one that changes something, and let this process know."""
        result = await self.note(method, *args, **kwargs)
        try:
            await self._changed()
        except CatalogUnavailable as error:  # what is written is written
            logger.warning("a change of the catalog will be seen here a moment late: %s", error)
        return result

    async def note(self, method: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call one that changes nothing of what rows ask for."""
        return await asyncio.get_running_loop().run_in_executor(self._writing, lambda: method(*args, **kwargs))
