"""What the replicas shall hold beyond what rows ask for: pinned and preloaded adapters, and none that are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.registrar import Registrar
from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion
from deployments.bases import Bases

logger = logging.getLogger(__name__)

_LOOK_S = 1.0  # how soon a new replica is noticed


class Holdings:
    """Brings the replicas in line with the catalog."""

    def __init__(self, catalog: Catalog, registrar: Registrar, bases: Bases) -> None:
        self._catalog = catalog
        self._registrar = registrar
        self._bases = bases

    async def settle(self, name: str) -> None:
        """Bring the replicas in line with the catalog on a pinned or preloaded adapter. Raises why one refuses."""
        registration = await self._registrar.read(self._catalog.registration, name)
        meant = await self.meant(name)
        spec = registration.spec
        await self.unpin_versions(name)
        if not (spec.pinned or spec.preload):
            return
        for version in meant:
            outcomes = await self.tell(version, "pin" if spec.pinned else "warm", version)
            for error in outcomes.values():
                if error is not None:
                    raise error
        await self._unpin(meant)  # what was let go while it was being pinned

    async def settle_all(self, names: Iterable[str]) -> None:
        """``settle`` for adapters whose change is done already: what refuses is only logged."""
        for name in names:
            try:
                await self.settle(name)
            except AdapterRouterError as error:
                logger.error("adapter %s is not on every replica: %s", name, error)

    async def align(self, replicas: Collection[str] | None = None) -> set[str]:
        """Bring ``replicas``, else all, in line with the catalog on all that is pinned or preloaded.

        Refusals are only logged. Returns the replicas that have answered to everything.
        """
        aligned: set[str] = set()
        for pool in self._bases:
            held = await pool.ask_all("residency", among=replicas)  # before the catalog: it knows of all pins in there
            wanted = await self._registrar.read(self._catalog.preloaded, pool.base.fingerprint)
            loose = {each.digest for listed in held.values() for each in listed if each.pinned}
            kept = {version.digest for version, pinned in wanted if pinned}
            answered = held.keys() & (await pool.ask_all("unpin", sorted(loose - kept), among=replicas)).keys()
            for version, pinned in wanted:
                errors = await pool.ask_all("pin" if pinned else "warm", version, among=replicas)
                answered &= errors.keys()
                for error in errors.values():
                    if error is not None:
                        logger.error("adapter %s is not on every replica: %s", version.adapter, error)
            await self._unpin(version for version, pinned in wanted if pinned)  # as in ``settle``
            aligned |= answered
        return aligned

    async def keep_aligned(self) -> None:
        """Replicas read the catalog as they start; what has changed until they are known here, they are told now.

        This router, too, may have come after one that was killed between a change and telling the replicas of it.
        """
        aligned: set[str] = set()
        while True:
            living = {replica for pool in self._bases for replica in pool.living()}
            try:
                aligned &= living
                if fresh := living - aligned:
                    aligned |= await self.align(fresh)
            except Exception:
                logger.exception("replicas that have just come cannot be told what they shall hold")
            await asyncio.sleep(_LOOK_S)

    async def tell(self, version: AdapterVersion, method: str, *args: object) -> dict[str, AdapterRouterError | None]:
        """What every replica of the version's base answers to a call about it; nothing where that is not served."""
        pool = self._bases.of(version)
        return {} if isinstance(pool, AdapterRouterError) else await pool.ask_all(method, *args)

    async def free(self, versions: Collection[AdapterVersion]) -> None:
        """Let replicas forget what no adapter has any more."""
        await self._unpin(versions)
        for version in versions:
            if not await self._registrar.read(self._catalog.holds, version.digest):
                await self.tell(version, "evict", version.digest)

    async def unpin_versions(self, name: str) -> None:
        """Let replicas evict what ``name`` does not mean any more."""
        await self._unpin(record.version for record in await self._registrar.read(self._catalog.versions, name))

    async def _unpin(self, versions: Iterable[AdapterVersion]) -> None:
        """Let replicas evict those of ``versions`` that no pinned adapter means (any more); contents may be shared."""
        loose = {(version.base, version.digest) for version in versions}
        for pool in self._bases:
            base = pool.base.fingerprint
            if digests := {digest for of, digest in loose if of == base}:
                wanted = await self._registrar.read(self._catalog.preloaded, base)
                digests -= {version.digest for version, pinned in wanted if pinned}
                await pool.ask_all("unpin", sorted(digests))

    async def meant(self, name: str) -> list[AdapterVersion]:
        """The versions that ``name`` leads to."""
        routes = await self._registrar.read(self._catalog.routes, [name])
        return [version for version, _ in routes[name].choices] if name in routes else []
