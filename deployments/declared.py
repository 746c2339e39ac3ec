"""What shall be served: declared by the configuration's ``adapters`` and ``manifest`` file, or by a posted manifest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from adapter_router.catalog.declaration import Difference, apply, drift, parse
from adapter_router.catalog.records import AdapterSpec
from adapter_router.errors import AdapterRouterError, InvalidRequest
from deployments.adapters import Adapters

logger = logging.getLogger(__name__)

_WATCH_S = 2.0  # how soon a changed manifest, a new ConfigMap, is noticed


class Declared:
    """The declaration in force, and the catalog brought in line with it."""

    def __init__(self, adapters: Adapters, specs: Sequence[AdapterSpec], manifest: Path | None) -> None:
        self.error: str | None = None  # why the manifest cannot be followed as it is now
        self._adapters = adapters
        self._specs = list(specs)
        self._manifest = manifest
        self._seen: str | None = None
        self._watch: asyncio.Task[None] | None = None

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
        await asyncio.gather(*(self._look_again(spec.name) for spec in self._specs if spec.name not in changed))
        if self._manifest is not None:
            self._watch = asyncio.get_running_loop().create_task(self._keep_watching())

    async def reconcile(self, text: str | None = None, *, only_look: bool = False) -> list[Difference]:
        """Bring the catalog in line with the manifest ``text``, or with the configuration; returns what differed.

        ``only_look``: nothing is changed. Raises InvalidRequest with every problem of the manifest.
        """
        if text is not None and self.is_configured:
            raise InvalidRequest("this application declares its adapters in its configuration; change them there")
        if text is None and not self.is_configured:  # else everything that was posted would go
            raise InvalidRequest("this application's configuration declares no adapters; send a manifest")
        if text is not None:
            specs = parse(text)
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
        return [*self._specs, *parse(text)], text

    async def _read(self) -> str:
        assert self._manifest is not None
        try:
            return await asyncio.to_thread(self._manifest.read_text)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the manifest {self._manifest} cannot be read: {error}") from error

    async def _bring_about(self, specs: Sequence[AdapterSpec]) -> list[Difference]:
        self._adapters.check(specs)
        differences = await self._adapters.registrar.write(apply, specs, self._adapters.catalog)
        for difference in differences:
            logger.info("%s", difference)
        if any(difference.kind != "added" for difference in differences):
            await self._adapters.holdings.align()
        return differences

    def _complain(self, error: object) -> None:
        told = None if error is None else str(error)
        if told is not None and told != self.error:
            logger.error("what is declared is not what is served: %s", told)
        self.error = told

    async def _look_again(self, name: str) -> None:
        """What lies at a declared source may have changed while nobody served it."""
        try:
            await self._adapters.refresh(name)
        except AdapterRouterError as error:
            logger.warning("the source of %s cannot be looked at again: %s", name, error)

    async def _keep_watching(self) -> None:
        assert self._manifest is not None
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                if await self._read() != self._seen or self.error is not None:
                    await self._follow()
            except AdapterRouterError as error:
                self._complain(error)
