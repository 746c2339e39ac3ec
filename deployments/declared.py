"""What shall be served: declared by the configuration's ``adapters`` and ``manifest`` file, or by a posted manifest."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from adapter_router.catalog.declaration import Difference, apply, drift, parse
from adapter_router.catalog.records import AdapterSpec
from adapter_router.errors import AdapterRouterError, InvalidRequest
from deployments.adapters import Adapters

logger = logging.getLogger(__name__)

_WATCH_S = 2.0  # how soon a changed manifest, a new ConfigMap, is noticed
_PATIENCE = 15  # such looks until what cannot be followed is tried again unchanged: each reads the whole catalog
_LOOK_S = 10.0  # how long a start waits for sources that are looked at again; slow ones go on behind it


class Declared:
    """The declaration in force, and the catalog brought in line with it."""

    def __init__(self, adapters: Adapters, specs: Sequence[AdapterSpec], manifest: Path | None) -> None:
        self.error: str | None = None  # why the manifest cannot be followed as it is now
        self._adapters = adapters
        self._specs = list(specs)
        self._manifest = manifest
        self._seen: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_configured(self) -> bool:
        """Whether the configuration declares adapters; else what somebody posts is the declaration."""
        return bool(self._specs) or self._manifest is not None

    async def start(self) -> None:
        """Declare what is configured, and wait until that of it which must be there at once is servable or refused."""
        if not self.is_configured:
            return  # what somebody has posted stays
        changed: set[str] = set()
        try:
            changed = {difference.name for difference in await self._follow()}
            specs, _ = await self._configured()
        except InvalidRequest as error:  # the catalog knows what was declared before
            specs = self._specs
            self._complain(error)
        at_once = [spec.name for spec in specs if spec in self._specs or spec.preload or spec.pinned]
        await self._adapters.make_ready(at_once)
        looks = [self._begin(self._look_again(spec.name)) for spec in self._specs if spec.name not in changed]
        if looks:
            await asyncio.wait(looks, timeout=_LOOK_S)
        if self._manifest is not None:
            self._begin(self._keep_watching())

    async def reconcile(self, text: str | None = None, *, only_look: bool = False) -> list[Difference]:
        """Bring the catalog in line with the manifest ``text``, or with the configuration; returns what differed.

        ``only_look``: nothing is changed. Raises InvalidRequest with every problem of the manifest.
        """
        if text is not None and self.is_configured:
            raise InvalidRequest("this application declares its adapters in its configuration; change them there")
        if text is None and not self.is_configured:  # else everything that was posted would go
            raise InvalidRequest("this application's configuration declares no adapters; send a manifest")
        if text is not None:
            specs = await asyncio.to_thread(parse, text)
        elif only_look:
            specs, _ = await self._configured()
        else:
            return await self._follow()
        if only_look:
            return await self._adapters.registrar.read(drift, specs, self._adapters.catalog)
        return await self._bring_about(specs)

    async def _follow(self) -> list[Difference]:
        """Bring about what is configured now."""
        specs, seen = await self._configured()
        differences = await self._bring_about(specs)
        self._seen = seen
        conflicts = [str(difference) for difference in differences if difference.kind == "conflict"]
        self._complain("; ".join(conflicts) if conflicts else None)
        return differences

    async def _configured(self) -> tuple[list[AdapterSpec], str | None]:
        """What is declared, and the manifest's text that says so."""
        if self._manifest is None:
            return self._specs, None
        text = await self._read()
        return [*self._specs, *await asyncio.to_thread(parse, text)], text  # seconds, for thousands of adapters

    async def _read(self) -> str:
        assert self._manifest is not None
        try:
            return await asyncio.to_thread(self._manifest.read_text)
        except (OSError, UnicodeDecodeError) as error:
            self._seen = None
            raise InvalidRequest(f"the manifest {self._manifest} cannot be read: {error}") from error

    async def _bring_about(self, specs: Sequence[AdapterSpec]) -> list[Difference]:
        await asyncio.to_thread(self._adapters.check, specs)
        differences = await self._adapters.registrar.write(apply, specs, self._adapters.catalog)
        for difference in differences:
            logger.info("%s", difference)
        if any(difference.kind not in ("added", "conflict") for difference in differences):
            await self._adapters.holdings.align()
        return differences

    def _complain(self, error: object) -> None:
        told = None if error is None else str(error)
        if told is not None and told != self.error:
            logger.error("what is declared is not what is served: %s", told)
        self.error = told

    async def _look_again(self, name: str) -> None:
        """What lies at a declared source may have changed while nobody served it; what is known keeps its share."""
        try:
            await self._adapters.refresh(name, activate=None)
        except AdapterRouterError as error:
            logger.warning("the source of %s cannot be looked at again: %s", name, error)
        except Exception:
            logger.exception("the source of %s cannot be looked at again", name)

    async def _keep_watching(self) -> None:
        for look in itertools.count():
            await asyncio.sleep(_WATCH_S)
            try:
                text = await self._read()
                if text != self._seen or (self.error is not None and look % _PATIENCE == 0):
                    self._seen = text
                    await self._follow()
            except InvalidRequest as error:
                self._complain(error)
            except AdapterRouterError as error:  # it may pass
                self._seen = None
                self._complain(error)
            except Exception as error:
                logger.exception("the manifest cannot be followed")
                self._complain(f"following the manifest failed for a fault of ours: {type(error).__name__}")

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
