"""What the replicas shall hold beyond what rows ask for: pinned and preloaded adapters, and none that are gone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import Alias
from adapter_router.catalog.registrar import Registrar
from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion
from deployments.bases import Bases

logger = logging.getLogger(__name__)


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
        for version in meant if spec.pinned or spec.preload else ():
            outcomes = await self.tell(version, "pin" if spec.pinned else "warm", version)
            for error in outcomes.values():
                if error is not None:
                    raise error

    async def align(self) -> None:
        """Bring the replicas in line with the catalog on all that is pinned or preloaded; refusals are only logged."""
        for pool in self._bases:
            wanted = await self._registrar.read(self._catalog.preloaded, pool.base.fingerprint)
            held = await pool.ask_all("residency")
            loose = {each.digest for listed in held.values() for each in listed if each.pinned}
            await pool.ask_all("unpin", sorted(loose - {version.digest for version, pinned in wanted if pinned}))
            for version, pinned in wanted:
                for error in (await pool.ask_all("pin" if pinned else "warm", version)).values():
                    if error is not None:
                        logger.error("adapter %s is not on every replica: %s", version.adapter, error)

    async def settle_targets(self, alias: Alias) -> None:
        """``settle`` for every adapter that ``alias`` leads to."""
        for adapter in {target.adapter for target in alias.targets}:
            await self.settle(adapter)

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
