"""Registrations on their way: each alone, taken up by whoever lives, and never half done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_router.catalog.catalog import Catalog
from adapter_router.catalog.fetches import Fetches
from adapter_router.catalog.records import AdapterSpec, Registration
from adapter_router.catalog.registrar import Registrar
from adapter_router.catalog.routes import Routes
from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.config import SourceConfig
from adapter_router.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogUnavailable,
    ReplicaLost,
)
from adapter_router.types import AdapterVersion, LoadReport, Source
from tests.catalogs import version
from tests.serving import wait_for
from tests.tiny import TinyBase

BASE = "sha256:base"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


class Gate(Fetcher):
    """Fetches when it is let."""

    def __init__(self, store: ContentStore) -> None:
        super().__init__(SourceConfig(), store)
        self.begun: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def fetch(self, source: Source, progress: Any = None) -> StoredAdapter:
        self.begun.append(source.uri)
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        return super().fetch(source, progress)


class World:
    """One router's registrar, and a base that accepts what ``judge`` lets through."""

    def __init__(self, root: Path, url: str) -> None:
        self.catalog = Catalog(url)
        self.store = ContentStore(root / "store")
        self.routes = Routes(self.catalog)
        self.judge: Callable[[AdapterSpec], Coroutine[Any, Any, None]] = self._accept
        self.checked: list[tuple[str, bool]] = []
        self.blind = False  # what changes cannot be followed
        self.gate = Gate(self.store)
        self.registrar = Registrar(self.catalog, self.gate, self.store, self._check, self._changed)

    async def _accept(self, spec: AdapterSpec) -> None:
        pass

    async def _check(self, spec: AdapterSpec, stored: StoredAdapter, resident: bool) -> LoadReport:
        self.checked.append((spec.name, resident))
        await self.judge(spec)
        labels = spec.labels or ("x", "y")
        version = AdapterVersion(
            spec.name, stored.digest, stored.directory, "text-classification", labels, "softmax", base=BASE
        )
        return LoadReport(version, 1, ("m",), (8,), 1, {"m": 1.0}, ())

    async def phase(self, name: str, phase: str) -> Registration:
        """Wait for a phase that comes by itself."""
        await asyncio.to_thread(wait_for, lambda: self.catalog.registration(name).phase == phase)
        return self.catalog.registration(name)

    async def _changed(self) -> None:
        if self.blind:
            raise CatalogUnavailable("not just now")
        await asyncio.to_thread(self.routes.follow)


class Pause:
    """A judge that waits for a word, and then says what it was told to."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, _: AdapterSpec) -> None:
        self.begun.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error


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


def test_one_registered_again_while_it_is_checked_is_fetched_and_checked_again(
    tmp_path: Path, url: str, directory: Path, tiny_bert: TinyBase
) -> None:
    """From the same place: what was written over there, and what is said of it otherwise, is what is served."""

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.judge = pause = Pause()
            await one.registrar.register(spec(directory))
            await pause.begun.wait()
            tiny_bert.adapter(directory, 2, 99)
            await one.registrar.register(spec(directory), replace=True)
            pause.go.set()
            assert (await one.registrar.ready("a", 20)).phase == "Ready"
            (record,) = one.catalog.versions("a")
            stored = await one.registrar.read(one.store.admit, directory)
            assert record.version.digest == stored.digest and len(one.checked) == 2

    run(scenario())


def test_what_was_checked_for_other_labels_is_not_served(tmp_path: Path, url: str, directory: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url, start=False) as one:
            await one.registrar.load(spec(directory))
            one.judge = pause = Pause()
            refreshed = asyncio.create_task(one.registrar.refresh("a"))
            await pause.begun.wait()
            one.catalog.register(spec(directory, labels=("n", "m")), replace=True)
            pause.go.set()
            with pytest.raises(AdapterConflict, match="registered anew"):
                await refreshed
            assert one.catalog.registration("a").phase == "Registered", "that is still to be checked"
            assert (await one.registrar.ready("a", 20)).phase == "Ready"
            route = one.catalog.routes(["a"])["a"]
            assert [version.labels for version, _ in route.choices] == [("n", "m")]

    run(scenario())


@pytest.mark.parametrize("error", [None, AdapterUnavailable("later"), AdapterRejected("no")])
def test_who_comes_too_late_changes_nothing(tmp_path: Path, url: str, directory: Path, error: Exception | None) -> None:
    """A router was stopped for longer than its claim lasts, and another has finished its work."""

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.judge = pause = Pause()
            await one.registrar.register(spec(directory))
            await pause.begun.wait()
            newer = one.catalog.add_version("a", version("a", 7, source=Source(str(directory))))
            pause.error = error
            pause.go.set()
            await asyncio.to_thread(wait_for, lambda: not one.registrar._in_hand)
            now = one.catalog.registration("a")
            assert (now.phase, now.reason, now.attempts) == ("Ready", None, 0)
            assert one.catalog.versions("a") == [newer]
            assert one.catalog.routes(["a"])["a"].choices == ((newer.version, 1),)

    run(scenario())


def test_a_source_that_is_dead_for_weeks_is_still_tried_in_bearable_intervals(
    tmp_path: Path, url: str, directory: Path
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.judge = pause = Pause()
            pause.error = dead = AdapterUnavailable("dead")
            pause.go.set()
            one.catalog.register(spec(directory))
            one.catalog.set_phase("a", "Failed", dead, retry_at=time.time(), attempts=5000)
            await asyncio.to_thread(wait_for, lambda: one.catalog.registration("a").attempts == 5001)
            failed = one.catalog.registration("a")
            assert failed.phase == "Failed" and failed.retry_at is not None
            assert 400 < failed.retry_at - time.time() < 800

    run(scenario())


def test_a_claim_is_kept_through_an_outage_of_the_database(
    tmp_path: Path, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_router.catalog.registrar._CLAIM_S", 0.3)

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.judge = pause = Pause()
            claims = 0
            real = one.catalog.claim

            def claim(name: str, owner: str, seconds: float) -> bool:
                nonlocal claims
                claims += 1
                if claims == 2:
                    raise CatalogUnavailable("not just now")
                return real(name, owner, seconds)

            one.catalog.claim = claim  # type: ignore[method-assign]
            await one.registrar.register(spec(directory))
            await pause.begun.wait()
            await asyncio.to_thread(wait_for, lambda: claims >= 5)
            pause.go.set()
            assert (await one.registrar.ready("a", 20)).phase == "Ready"

    run(scenario())


def test_what_is_written_is_written_even_if_nobody_can_look(tmp_path: Path, url: str, directory: Path) -> None:
    """The copy stays, too: the version needs it."""

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.blind = True
            report = await one.registrar.load(spec(directory))
            assert one.catalog.registration("a").phase == "Ready"
            assert one.store.find(report.version.digest) is not None

    run(scenario())


def test_a_copy_stays_when_the_catalog_does_not_say_whether_it_has_taken_it(
    tmp_path: Path, url: str, directory: Path
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            real = one.catalog.register_version

            def register_version(*args: Any, **kwargs: Any) -> Any:
                real(*args, **kwargs)
                raise CatalogUnavailable("the connection is gone, the change is not")

            one.catalog.register_version = register_version  # type: ignore[method-assign]
            with pytest.raises(CatalogUnavailable):
                await one.registrar.load(spec(directory))
            (record,) = one.catalog.versions("a")
            assert one.store.find(record.version.digest) is not None

    run(scenario())


def test_a_fetch_that_nobody_waits_for_keeps_its_turn_and_leaves_no_copy(
    tmp_path: Path, url: str, directory: Path
) -> None:
    """A client goes away; the thread cannot be stopped, and so is one of those that its place may have."""

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            one.gate.open.clear()
            load = asyncio.create_task(one.registrar.load(spec(directory)))
            await asyncio.to_thread(wait_for, lambda: one.gate.begun == [str(directory)])
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            (turn,) = one.registrar._fetches._turns.values()
            assert turn._value == 7
            one.gate.open.set()
            await asyncio.to_thread(wait_for, lambda: turn._value == 8)
            await asyncio.to_thread(wait_for, lambda: not list((tmp_path / "store").glob("sha256-*")))

    run(scenario())


def test_a_place_that_hangs_leaves_threads_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is one place, whosever repository it is."""
    monkeypatch.setattr("adapter_router.catalog.fetches._OF_A_PLACE", 2)

    async def scenario() -> None:
        store = ContentStore(tmp_path / "store")
        gate = Gate(store)
        gate.open.clear()
        fetches = Fetches(gate, store)

        async def fetch(uri: str) -> None:
            async with fetches.copy(Source(uri)):
                pass

        asked = ["hf://a/x", "hf://b/x", "hf://c/x", "s3://a/x", "s3://b/x", "https://h/x", str(tmp_path)]
        tasks = [asyncio.create_task(fetch(uri)) for uri in asked]
        await asyncio.to_thread(wait_for, lambda: len(gate.begun) == 6)
        assert set(gate.begun) == set(asked) - {"hf://c/x"}
        gate.error = AdapterUnavailable("it hung")
        gate.open.set()
        assert await asyncio.gather(*tasks, return_exceptions=True) == [gate.error] * len(asked)
        fetches.close()

    run(scenario())


def test_what_somebody_waits_for_is_begun_however_much_hangs(
    tmp_path: Path, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_router.catalog.registrar._UNASKED", 3)

    async def scenario() -> None:
        async with world(tmp_path, url) as one:
            pause = Pause()

            async def judge(wanted: AdapterSpec) -> None:
                if wanted.name.startswith("slow"):
                    await pause(wanted)

            one.judge = judge
            for number in range(5):
                await one.registrar.register(spec(directory, f"slow-{number}"))
            await pause.begun.wait()
            await one.registrar.register(spec(directory, "quick"))
            assert len(one.registrar._in_hand) == 3
            assert (await one.registrar.ready("quick", 20)).phase == "Ready"
            pause.go.set()
            for number in range(5):
                await one.phase(f"slow-{number}", "Ready")

    run(scenario())


def test_who_only_reads_waits_for_no_writer(tmp_path: Path, url: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url, start=False) as one:
            release = threading.Event()
            writers = [asyncio.create_task(one.registrar.write(release.wait, 60)) for _ in range(20)]
            await asyncio.sleep(0)
            try:
                assert await asyncio.wait_for(one.registrar.read(one.catalog.revision), 20) == 0
            finally:
                release.set()
            assert await asyncio.gather(*writers) == [True] * 20

    run(scenario())


def test_an_address_that_cannot_be_read_is_refused_as_such(tmp_path: Path, url: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path, url, start=False) as one:
            with pytest.raises(AdapterRejected, match="names no host"):
                await one.registrar.load(AdapterSpec("a", Source("https://[abc")))

    run(scenario())


def test_looking_again_undoes_no_rollback(tmp_path: Path, url: str, directory: Path, tiny_bert: TinyBase) -> None:
    """A router that starts looks at declared sources again; what was known is what the name has been led away from."""

    async def scenario() -> None:
        async with world(tmp_path, url, start=False) as one:
            await one.registrar.load(spec(directory))
            tiny_bert.adapter(directory, 2, 99)
            assert (await one.registrar.refresh("a", activate=None)).number == 2
            assert [t.number for t in one.catalog.alias("a").targets] == [2], "it was new"
            one.catalog.rollback("a")
            assert (await one.registrar.refresh("a", activate=None)).number == 2
            assert [t.number for t in one.catalog.alias("a").targets] == [1]

    run(scenario())
