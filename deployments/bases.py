"""The application's base models: which one a row, a version or a new adapter belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence

from adapter_router.catalog.records import AdapterSpec
from adapter_router.catalog.store import StoredAdapter
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterRouterError, InvalidRequest
from adapter_router.types import AdapterVersion, LoadReport
from deployments.pool import Pool


class Bases:
    """Pools by base; the first is meant where a row names neither adapter nor base."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        """Raises ValueError when two pools serve the same base: a row could not tell them apart."""
        self.first = pools[0]
        self._by_fingerprint = {pool.base.fingerprint: pool for pool in pools}
        self._by_name = {pool.base.name: pool for pool in pools}
        if len(self._by_fingerprint) < len(pools) or len(self._by_name) < len(pools):
            raise ValueError(f"a base is configured twice: {', '.join(pool.base.name for pool in pools)}")

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._by_fingerprint.values())

    def named(self, base: str) -> Pool | None:
        """The pool of a base, by its name or fingerprint."""
        return self._by_name.get(base) or self._by_fingerprint.get(base)

    @property
    def served(self) -> Collection[str]:
        """Names and fingerprints of all bases."""
        return {*self._by_name, *self._by_fingerprint}

    def meant(self, base: str) -> Pool:
        """The pool of a base, by its name or fingerprint. Raises InvalidRequest."""
        pool = self.named(base)
        if pool is None:
            served = ", ".join(pool.base.name for pool in self)
            raise InvalidRequest(f"no base {base!r:.200} is served; served are {served}", "base")
        return pool

    def check_name(self, adapter: str) -> None:
        """Raise InvalidRequest for a name that means a base already, as a name or as a fingerprint."""
        if self.named(adapter):
            raise InvalidRequest(f"{adapter!r} is the base model's name", "name")

    def of(self, version: AdapterVersion) -> Pool | AdapterFailed:
        """The pool that serves ``version``."""
        pool = self._by_fingerprint.get(version.base)
        return pool or AdapterFailed(
            f"adapter {version.adapter!r} belongs to base {version.base}, which is not served here", "model"
        )

    async def check(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        """Check a new adapter on the base it names, or find the one base it fits; ``resident``: and load it there.

        Raises AdapterRejected with every problem, of every base that was tried.
        """
        pools = list(self) if spec.base is None else [self.meant(spec.base)]
        if len(pools) == 1:
            return await pools[0].check(spec, stored, resident)
        reports = await asyncio.gather(*(pool.check(spec, stored, False) for pool in pools), return_exceptions=True)
        fitting = [pool for pool, report in zip(pools, reports, strict=True) if isinstance(report, LoadReport)]
        if len(fitting) == 1:
            return await fitting[0].check(spec, stored, resident)
        if fitting:
            names = ", ".join(pool.base.name for pool in fitting)
            raise AdapterRejected.because([f"it fits more than one base, {names}: say which one with base"])
        raise _refused(pools, reports)


def _refused(pools: Sequence[Pool], reports: Sequence[LoadReport | BaseException]) -> AdapterRouterError:
    """Why no base takes an adapter; a fault that may pass comes first: that base might."""
    problems = []
    for pool, error in zip(pools, reports, strict=True):
        if not isinstance(error, AdapterRejected):
            if isinstance(error, AdapterRouterError):
                return error
            raise error if isinstance(error, BaseException) else AssertionError(error)
        problems += [f"on {pool.base.name}: {problem}" for problem in error.problems]
    return AdapterRejected.because(problems)
