"""Registrations on their way: each alone, taken up by whoever lives, and never half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.records import AdapterSpec, Registration
from adapter_router.catalog.registrar import Registrar
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import SourceConfig
from adapter_router.errors import AdapterExists, AdapterNotFound, AdapterRejected, AdapterUnavailable, ReplicaLost
from adapter_router.types import AdapterVersion, LoadReport, Source
from tests.serving import wait_for
from tests.tiny import TinyBase

BASE = "sha256:base"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


class World:
    """One router's registrar, and a base that accepts what ``judge`` lets through."""

    def __init__(self, root: Path, url: str) -> None:
        self.catalog = Catalog(url)
        self.store = ContentStore(root / "store")
        self.routes = Routes(self.catalog)
        self.judge: Callable[[AdapterSpec], Coroutine[Any, Any, None]] = self._accept
        self.checked: list[tuple[str, bool]] = []
        self.registrar = Registrar(
            self.catalog, Fetcher(SourceConfig(), self.store), self.store, self._check, self._changed
        )

    async def _accept(self, spec: AdapterSpec) -> None:
        pass

    async def _check(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        self.checked.append((spec.name, resident))
        await self.judge(spec)
        version = AdapterVersion(
            spec.name, stored.digest, stored.directory, "text-classification", ("x", "y"), "softmax", base=BASE
        )
        return LoadReport(version, 1, ("m",), (8,), 1, {"m": 1.0}, ())

    async def phase(self, name: str, phase: str) -> Registration:
        """Wait for a phase that comes by itself."""
        await asyncio.to_thread(wait_for, lambda: self.catalog.registration(name).phase == phase)
        return self.catalog.registration(name)

    async def _changed(self) -> None:
        await asyncio.to_thread(self.routes.follow)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/catalog.db"


@asynccontextmanager
async def world(root: Path, url: str, *, start: bool = True) -> AsyncIterator[World]:
    made = World(root, url)
    if start:
        made.registrar.start()
    try:
        yield made
    finally:
        await made.registrar.close()
        made.catalog.close()


@pytest.fixture
def directory(tiny_bert: TinyBase, tmp_path: Path) -> Path:
    return Path(tiny_bert.adapter(tmp_path / "adapter", 2, 1))


def spec(directory: Path, name: str = "a", **fields: Any) -> AdapterSpec:
    return AdapterSpec(name, Source(str(directory)), **fields)


def test_a_registration_becomes_ready_by_itself(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            registration = await one.registrar.register(spec(directory))
            assert registration.phase == "Registered"
            assert (await one.registrar.ready("a", 20)).phase == "Ready"
            (record,) = one.catalog.versions("a")
            assert record.version.source == Source(str(directory)) and record.version.base == BASE
            assert one.checked == [("a", False)], "checked once, and nobody was evicted for it"
            kinds = [event.detail for event in one.catalog.events("a")]
            assert any("Fetching" in d for d in kinds) and any("Validating" in d for d in kinds)

    run(scenario())


def test_a_lazy_one_is_not_touched_before_somebody_asks(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            await one.registrar.register(spec(directory, lazy=True))
            await one.registrar.register(spec(directory, "b"))
            await one.registrar.ready("b", 20)
            assert one.catalog.registration("a").phase == "Registered" and one.checked == [("b", False)]
            assert (await one.registrar.ready("a", 20)).phase == "Ready"

    run(scenario())


def test_a_refused_one_fails_with_every_problem_and_leaves_no_copy(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:

            async def refuse(_: AdapterSpec) -> None:
                raise AdapterRejected.because(["rank too odd", "weights too heavy"])

            one.judge = refuse
            await one.registrar.register(spec(directory))
            failed = await one.registrar.ready("a", 20)
            assert failed.phase == "Failed" and failed.problems == ("rank too odd", "weights too heavy")
            assert failed.attempts == 1 and failed.retry_at is None and failed.code == "adapter_invalid"
            assert not list((tmp_path / "store").glob("sha256-*"))
            one.judge = one._accept
            assert (await one.registrar.retry("a", 20)).phase == "Ready"

    run(scenario())


def test_what_may_heal_is_tried_again_by_itself(
    tmp_path: Path, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_router.catalog.registrar._FIRST_RETRY_S", 0.1)

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            losses = iter([True, True, False])

            async def lose_twice(_: AdapterSpec) -> None:
                if next(losses):
                    raise ReplicaLost("gone")

            one.judge = lose_twice
            await one.registrar.register(spec(directory))
            failed = await one.registrar.ready("a", 20)
            assert failed.phase == "Failed" and failed.retry_at is not None and failed.retryable
            now = await one.phase("a", "Ready")
            assert len(one.checked) == 3 and now.reason is None

    run(scenario())


def test_one_that_hangs_delays_nobody(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            release = asyncio.Event()

            async def hang(wanted: AdapterSpec) -> None:
                if wanted.name.startswith("slow"):
                    await release.wait()

            one.judge = hang
            for number in range(40):
                await one.registrar.register(spec(directory, f"slow-{number}"))
            await one.registrar.register(spec(directory, "quick"))
            assert (await one.registrar.ready("quick", 20)).phase == "Ready"
            with pytest.raises(AdapterUnavailable, match="still being"):
                await one.registrar.ready("slow-0", 0.05)
            release.set()
            assert (await one.registrar.ready("slow-39", 20)).phase == "Ready"

    run(scenario())


def test_load_registers_nothing_that_is_refused(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            with pytest.raises(AdapterRejected):
                await one.registrar.load(spec(tmp_path / "nowhere"))
            with pytest.raises(AdapterNotFound):
                one.catalog.registration("a")
            report = await one.registrar.load(spec(directory))
            assert one.checked == [("a", True)] and report.version.source == Source(str(directory))
            with pytest.raises(AdapterExists):
                await one.registrar.load(spec(directory))
            assert one.catalog.registration("a").phase == "Ready"
            assert one.routes.missing({"a"}) == {"a"}
            await one.registrar.read(one.routes.fetch, {"a"})
            assert one.routes.find("a", None, None) == report.version

    run(scenario())


def test_changed_files_are_a_new_version_and_the_old_ones_stay(
    tmp_path: Path, url: str, directory: Path, tiny_bert: TinyBase
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            await one.registrar.load(spec(directory))
            same = await one.registrar.refresh("a")
            assert same.number == 1
            tiny_bert.adapter(directory, 2, 99)
            newer = await one.registrar.refresh("a", activate=False)
            assert newer.number == 2 and [t.number for t in one.catalog.alias("a").targets] == [1]
            again = await one.registrar.refresh("a")
            assert again.number == 2 and [t.number for t in one.catalog.alias("a").targets] == [2]
            for record in one.catalog.versions("a"):
                StoredAdapter(record.version.digest, Path(record.version.directory or "")).read()

    run(scenario())


def test_what_a_dead_router_left_is_taken_up(
    tmp_path: Path, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of a router that was killed lapses, and another finishes what it began."""
    monkeypatch.setattr("adapter_router.catalog.registrar._CLAIM_S", 0.5)

    async def scenario() -> None:
        catalog = Catalog(url)
        catalog.register(spec(directory))
        assert catalog.claim("a", "a router that died", 0.5)
        catalog.set_phase("a", "Validating")
        catalog.close()
        async with world(tmp_path, url) as one:
            await one.phase("a", "Ready")

    run(scenario())


def test_two_routers_do_not_do_the_same_work(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one, world(tmp_path, url) as two:
            names = [f"a{number}" for number in range(20)]

            async def slow(_: AdapterSpec) -> None:
                await asyncio.sleep(0.05)

            one.judge = two.judge = slow
            for name in names:
                await one.registrar.register(spec(directory, name))
            done = await asyncio.gather(*(r.registrar.ready(n, 30) for n in names for r in (one, two)))
            assert {registration.phase for registration in done} == {"Ready"}
            assert sorted(name for name, _ in one.checked + two.checked) == sorted(names)

    run(scenario())


def test_one_removed_while_it_is_fetched_stays_away(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            started, release = asyncio.Event(), asyncio.Event()

            async def wait(_: AdapterSpec) -> None:
                started.set()
                await release.wait()

            one.judge = wait
            await one.registrar.register(spec(directory))
            await started.wait()
            await one.registrar.write(one.catalog.remove, "a")
            release.set()
            with pytest.raises(AdapterNotFound):
                await one.registrar.ready("a", 20)
            with pytest.raises(AdapterNotFound):
                one.catalog.registration("a")

    run(scenario())


def test_one_replaced_while_it_is_fetched_becomes_the_newer(
    tmp_path: Path, url: str, directory: Path, tiny_bert: TinyBase
) -> None:
    async def scenario() -> None:
        other = Path(tiny_bert.adapter(tmp_path / "other", 2, 2))
        async with world(tmp_path, url) as one:
            started, release = asyncio.Event(), asyncio.Event()

            async def wait(_: AdapterSpec) -> None:
                started.set()
                await release.wait()

            one.judge = wait
            await one.registrar.register(spec(directory))
            await started.wait()
            await one.registrar.register(spec(other), replace=True)
            release.set()
            registration: Registration = await one.registrar.ready("a", 20)
            assert registration.phase == "Ready"
            (meant,) = one.catalog.alias("a").targets
            records = {record.number: record.version for record in one.catalog.versions("a")}
            assert records[meant.number].source == Source(str(other))

    run(scenario())
