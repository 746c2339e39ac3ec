"""Cold adapters on a whole engine: sources that hang or fail, several loads at once, pins, the host tier, refusals."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine, leasing, loads, residency
from adapter_router.engine.reading import admitted_copy
from adapter_router.engine.resident import ChangedModule, ResidentAdapter
from adapter_router.errors import AdapterFailed, AdapterRejected, AdapterUnavailable, InternalError, InvalidRequest
from adapter_router.types import AdapterFiles, AdapterVersion, Row, RowOutcome, RowResult, Source
from tests.tiny import TinyBase, edit_config, edit_tensors, random_features

NAMES = [f"a{number}" for number in range(8)]
FEATURES = random_features(np.random.default_rng(3))
WAIT_S = 30.0
ONE = 5_000  # bytes: room for one of the adapters below, not for two


class Sources:
    """``obtain`` of an engine: counts what is asked for; sources named in ``hung`` wait, those in ``broken`` raise."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.hung: set[str] = set()
        self.broken: dict[str, BaseException] = {}
        self.go_on = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, version: AdapterVersion) -> StoredAdapter:
        self.asked[version.adapter] += 1
        if version.adapter in self.hung:
            self.entered.release()
            assert self.go_on.wait(WAIT_S)
        if version.adapter in self.broken:
            raise self.broken[version.adapter]
        assert version.directory is not None
        return admitted_copy(replace(version, directory=Path(str(version.directory).removesuffix(".away"))))


@pytest.fixture(scope="module")
def adapters(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: tiny_bert.adapter(folder / name, 2, seed, r=4) for seed, name in enumerate(NAMES)}


@pytest.fixture
def sources() -> Iterator[Sources]:
    sources = Sources()
    yield sources
    sources.go_on.set()


@pytest.fixture
def make(
    tiny_bert: TinyBase, adapters: dict[str, Path], sources: Sources, tmp_path: Path
) -> Iterator[Callable[..., tuple[Engine, dict[str, AdapterVersion]]]]:
    """Engines whose adapters are admitted and cold."""
    engines = []

    def build(**fields: Any) -> tuple[Engine, dict[str, AdapterVersion]]:
        config = EngineConfig(base=str(tiny_bert.directory), device="cpu", store_dir=tmp_path / "store", **fields)
        engine = Engine(config, sources)
        engines.append(engine)
        versions = {name: engine.load_adapter(name, directory).version for name, directory in adapters.items()}
        for version in versions.values():
            engine.evict(version.digest)
        sources.asked.clear()
        return engine, versions

    yield build
    sources.go_on.set()
    for engine in engines:
        engine.close()


def away(version: AdapterVersion, uri: str) -> AdapterVersion:
    """``version`` as a node knows it that has no copy."""
    assert version.directory is not None
    return replace(version, directory=Path(f"{version.directory}.away"), source=Source(uri))


def ask(engine: Engine, *versions: AdapterVersion) -> list[RowOutcome]:
    return engine.infer_versions([Row(FEATURES, version.adapter) for version in versions], versions)


def asking(engine: Engine, *versions: AdapterVersion) -> tuple[threading.Thread, list[RowOutcome]]:
    answers: list[RowOutcome] = []
    thread = threading.Thread(target=lambda: answers.extend(ask(engine, *versions)), daemon=True)
    thread.start()
    return thread, answers


def sample(engine: Engine, name: str) -> float:
    return engine.metrics.registry.get_sample_value(f"adapter_router_{name}") or 0.0


def _be_patient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (loads, residency, leasing):
        monkeypatch.setattr(module, "PATIENCE_S", seconds)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- one load delays no other --------------------------------------------------------------------------------------


def test_sources_that_hang_delay_nobody_else(make: Any, sources: Sources) -> None:
    engine, versions = make(loader_threads=1)
    expected = [result.logits for result in ask(engine, *versions.values())]
    for version in versions.values():
        engine.evict(version.digest)
    stuck = [away(versions[name], f"s3://bucket/{name}") for name in NAMES[:6]]
    sources.hung = set(NAMES[:6])
    waiting = [asking(engine, version) for version in stuck]
    for _ in range(4):  # as many as one source is asked for at once
        assert sources.entered.acquire(timeout=WAIT_S)
    for number, name in ((6, "a6"), (7, "a7")):
        for version in (versions[name], away(versions[name], f"https://other.example/{name}")):
            (answer,) = ask(engine, version)
            np.testing.assert_allclose(answer.logits, expected[number], atol=1e-6)
            engine.evict(version.digest)
    assert all(thread.is_alive() for thread, _ in waiting)
    sources.go_on.set()
    for number, (thread, answers) in enumerate(waiting):
        thread.join(WAIT_S)
        np.testing.assert_allclose(answers[0].logits, expected[number], atol=1e-6)  # type: ignore[union-attr]


def test_rows_of_one_call_do_not_wait_for_a_neighbour_that_hangs(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    thread, answers = asking(engine, versions["a0"], versions["a1"], versions["a2"])
    assert sources.entered.acquire(timeout=WAIT_S)
    while sample(engine, "forward_rows_sum") < 2:
        assert thread.is_alive()
    assert not answers
    sources.go_on.set()
    thread.join(WAIT_S)
    assert len(answers) == 3 and all(isinstance(answer, RowResult) for answer in answers)


def test_loads_run_side_by_side_and_not_more_of_them(make: Any, sources: Sources) -> None:
    engine, versions = make(loader_threads=3)
    sources.hung = set(NAMES)
    threads = [asking(engine, version)[0] for version in versions.values()]
    for _ in range(5):
        assert sources.entered.acquire(timeout=WAIT_S)
    assert sum(sources.asked.values()) == 5, "three that compute and two that read ahead"
    sources.go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert sources.asked == Counter(NAMES)


def test_a_load_that_is_slow_to_start_holds_up_nobody(
    make: Any, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be long in coming, and the disk where its copy may lie long in answering."""
    engine, versions = make()
    engine.warm(versions["a1"])
    near = engine._residency._loading._near
    submit = near.submit

    def slowly(lane: str, work: Callable[[], None]) -> Future[None]:
        sources.entered.release()
        assert sources.go_on.wait(WAIT_S)
        future: Future[None] = submit(lane, work)
        return future

    monkeypatch.setattr(near, "submit", slowly)
    cold, _ = asking(engine, versions["a0"])
    assert sources.entered.acquire(timeout=WAIT_S)
    warm, answers = asking(engine, versions["a1"])
    warm.join(WAIT_S / 3)
    assert cold.is_alive() and answers and isinstance(answers[0], RowResult)
    sources.go_on.set()
    cold.join(WAIT_S)


def test_mixes_cannot_occupy_the_loaders(make: Any, sources: Sources) -> None:
    engine, versions = make(loader_threads=1)
    sources.hung = {"a0"}
    mixes: list[Any] = [{"a0": 1.0, "a1": float(weight)} for weight in range(10)]
    results: list[RowOutcome] = []
    rows = [Row(FEATURES, mix, head="a0") for mix in mixes]
    thread = threading.Thread(target=lambda: results.extend(engine.infer(rows)), daemon=True)
    thread.start()
    assert sources.entered.acquire(timeout=WAIT_S)
    assert all(isinstance(answer, RowResult) for answer in ask(engine, versions["a2"], versions["a3"]))
    assert thread.is_alive()
    sources.go_on.set()
    thread.join(WAIT_S)
    assert len(results) == 10 and all(isinstance(result, RowResult) for result in results)


def test_a_mix_that_takes_long_to_compute_holds_up_mixes_alone(
    make: Any, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, versions = make(loader_threads=1)
    reader = engine._residency._loading._reader
    compute = reader._mix

    def slowly(*args: Any) -> Any:
        sources.entered.release()
        assert sources.go_on.wait(WAIT_S)
        return compute(*args)

    monkeypatch.setattr(reader, "_mix", slowly)
    rows = [Row(FEATURES, {"a0": 1.0, "a1": float(weight)}, head="a0") for weight in range(4)]
    thread = threading.Thread(target=engine.infer, args=(rows,), daemon=True)
    thread.start()
    assert sources.entered.acquire(timeout=WAIT_S)
    assert isinstance(ask(engine, versions["a2"])[0], RowResult)
    assert not sources.entered.acquire(blocking=False), "one mix at once"
    sources.go_on.set()
    thread.join(WAIT_S)


def test_one_load_serves_all_who_ask(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    asked = [asking(engine, versions["a0"]) for _ in range(8)]
    assert sources.entered.acquire(timeout=WAIT_S)
    sources.go_on.set()
    for thread, answers in asked:
        thread.join(WAIT_S)
        assert isinstance(answers[0], RowResult)
    assert sources.asked == {"a0": 1}


def test_a_closing_engine_leaves_a_hung_load_behind(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    thread, answers = asking(engine, away(versions["a0"], "s3://bucket/a0"))
    assert sources.entered.acquire(timeout=WAIT_S)
    engine.close()
    thread.join(WAIT_S)
    assert isinstance(answers[0], AdapterUnavailable) and "closing" in str(answers[0])


def test_nobody_waits_longer_than_is_bearable(make: Any, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    _be_patient(monkeypatch, 0.05)
    for _ in range(2):  # the second does not even start to wait
        late, fine = ask(engine, away(versions["a0"], "s3://bucket/a0"), versions["a1"])
        assert isinstance(late, AdapterUnavailable) and "try again" in str(late)
        assert isinstance(fine, RowResult | AdapterUnavailable)
    sources.go_on.set()
    _be_patient(monkeypatch, WAIT_S)
    (answer,) = ask(engine, versions["a0"])
    assert isinstance(answer, RowResult)
    assert all(held.leases == 0 for held in engine.residency())


# -- what fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [AdapterUnavailable("the bucket answers 500"), AdapterFailed("the source has changed"), OSError("disk")]
)
def test_a_broken_source_is_asked_once_in_a_while(make: Any, sources: Sources, error: Exception) -> None:
    engine, versions = make()
    sources.broken = {"a0": error}
    first, fine = ask(engine, versions["a0"], versions["a1"])
    assert isinstance(fine, RowResult)
    for _ in range(5):
        (again,) = ask(engine, versions["a0"])
        assert type(again) is type(first) and str(again) == str(first)
    assert sources.asked["a0"] == 1
    sources.broken = {}
    while not isinstance(outcome := ask(engine, versions["a0"])[0], RowResult):
        assert str(outcome) == str(first)
    assert sources.asked["a0"] == 2


def test_refused_content_is_not_read_again(make: Any, sources: Sources, tiny_bert: TinyBase, tmp_path: Path) -> None:
    engine, versions = make()
    bad = tiny_bert.adapter(tmp_path / "bad", 2, 1)
    edit_config(bad, target_modules=["query"])
    stored = engine._store.admit(bad)
    version = replace(versions["a0"], adapter="bad", digest=stored.digest, directory=stored.directory)
    for _ in range(3):
        (outcome,) = ask(engine, version)
        assert isinstance(outcome, AdapterRejected) and "target_modules does not name" in str(outcome)
    assert sources.asked["bad"] == 1
    (stored.directory / "adapter_config.json").unlink()
    with pytest.raises(AdapterRejected, match="target_modules does not name"):
        engine.admit("bad", stored, version.task, version.labels)


def test_what_was_refused_with_other_labels_is_looked_at(make: Any, adapters: dict[str, Path]) -> None:
    engine, _ = make()
    for labels in (["x"], ["y", "y"]):
        with pytest.raises(AdapterRejected):
            engine.load_adapter("z", adapters["a0"], labels=labels)
    assert engine.load_adapter("z", adapters["a0"], labels=["x", "y"]).version.labels == ("x", "y")


def test_a_version_of_another_base_is_refused(make: Any, sources: Sources) -> None:
    engine, versions = make()
    assert versions["a0"].base == engine.base.fingerprint
    foreign = replace(versions["a0"], base="sha256:another")
    wrong, right = ask(engine, foreign, versions["a1"])
    assert isinstance(wrong, AdapterRejected) and "belongs to the base sha256:another" in str(wrong)
    assert isinstance(right, RowResult)
    with pytest.raises(AdapterRejected, match="another"):
        engine.warm(foreign)
    assert sources.asked == {"a1": 1}


def test_what_is_in_memory_for_one_task_serves_no_other(make: Any) -> None:
    engine, versions = make()
    engine.warm(versions["a0"])
    other = replace(versions["a0"], task="token-classification")
    (outcome,) = ask(engine, other)
    assert isinstance(outcome, AdapterRejected) and "already serve text-classification" in str(outcome)


def test_a_load_that_fails_at_once_is_told_at_once(
    make: Any, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be done before the one that asked goes on."""
    engine, versions = make()
    _be_patient(monkeypatch, 3.0)
    near = engine._residency._loading._near
    submit = near.submit

    def slowly(lane: str, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = submit(lane, work)
        wait_for([future], WAIT_S)
        return future

    monkeypatch.setattr(near, "submit", slowly)
    sources.broken = {"a0": AdapterUnavailable("gone")}
    (outcome,) = ask(engine, versions["a0"])
    assert str(outcome) == "gone"


class Panic(BaseException):
    """As libraries written in Rust raise it."""


class Panicking(StoredAdapter):
    def read(self) -> AdapterFiles:
        raise Panic


def test_a_library_that_panics_fails_one_adapter(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.broken = {"a0": Panic()}
    for _ in range(2):
        bad, fine = ask(engine, versions["a0"], versions["a1"])
        assert isinstance(bad, InternalError) and "Panic" in str(bad)
        assert isinstance(fine, RowResult)
    assert sources.asked["a0"] == 1
    with pytest.raises(InternalError, match="Panic"):
        engine.admit("x", Panicking("sha256:x", Path()))


def test_a_refused_adapters_files_do_not_stay_in_memory(make: Any, tiny_bert: TinyBase, tmp_path: Path) -> None:
    engine, _ = make()
    bad = tiny_bert.adapter(tmp_path / "bad", 2, 1)
    edit_config(bad, target_modules=["query"])
    seen: list[weakref.ref[AdapterFiles]] = []

    class Watched(StoredAdapter):
        def read(self) -> AdapterFiles:
            files = super().read()
            seen.append(weakref.ref(files))
            return files

    stored = engine._store.admit(bad)
    with pytest.raises(AdapterRejected):
        engine.admit("bad", Watched(stored.digest, stored.directory))
    gc.collect()
    _wait_until(lambda: seen[0]() is None)


# -- names of one content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"task": "token-classification"}, {"base": "sha256:another"}])
def test_one_name_that_is_refused_hurts_no_other_of_the_same_content(make: Any, fields: dict[str, Any]) -> None:
    engine, versions = make()
    (alone,) = ask(engine, versions["a0"])
    wrong = replace(versions["a0"], adapter="wrong", **fields)
    for order in ((versions["a0"], wrong), (wrong, versions["a0"])):
        by_name = dict(zip((version.adapter for version in order), ask(engine, *order), strict=True))
        assert isinstance(by_name["wrong"], AdapterRejected)
        np.testing.assert_allclose(by_name["a0"].logits, alone.logits, atol=1e-6)
    assert all(held.leases == 0 for held in engine.residency())


def test_who_asks_for_another_task_does_not_get_what_is_being_loaded(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    right = asking(engine, versions["a0"])
    assert sources.entered.acquire(timeout=WAIT_S)
    wrong = asking(engine, replace(versions["a0"], adapter="wrong", task="token-classification"))
    _wait_until(lambda: not wrong[0].is_alive() or bool(sample(engine, "cache_misses_total") == 2))
    sources.go_on.set()
    for thread, _ in (right, wrong):
        thread.join(WAIT_S)
    assert isinstance(right[1][0], RowResult)
    assert isinstance(wrong[1][0], AdapterRejected) and "already serve text-classification" in str(wrong[1][0])


@pytest.mark.parametrize("fields", [{}, {"labels": ("one label of two",)}])
def test_who_waits_for_the_load_of_another_name_does_not_get_its_error(
    make: Any, sources: Sources, fields: dict[str, Any]
) -> None:
    engine, versions = make()
    wrong = replace(versions["a0"], adapter="wrong", **fields)
    sources.hung = {"wrong"}
    if not fields:
        sources.broken = {"wrong": AdapterUnavailable("its bucket answers 500")}
    first = asking(engine, wrong)
    assert sources.entered.acquire(timeout=WAIT_S)
    others = [asking(engine, replace(versions["a0"], adapter=name)) for name in ("twin", "twin", "other")]
    _wait_until(lambda: sample(engine, "cache_misses_total") == 4)
    sources.go_on.set()
    for thread, _ in (first, *others):
        thread.join(WAIT_S)
    assert isinstance(first[1][0], AdapterUnavailable | AdapterRejected)
    assert all(isinstance(answers[0], RowResult) for _, answers in others)
    assert sources.asked["twin"] + sources.asked["other"] == 1
    assert all(held.leases == 0 for held in engine.residency())


def test_a_source_that_fails_is_no_fault_of_another_with_the_same_content(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.broken = {"a0": AdapterUnavailable("its bucket answers 500"), "b0": AdapterFailed("it has changed")}
    for name, says in (("a0", "500"), ("b0", "changed")):
        (outcome,) = ask(engine, replace(versions["a0"], adapter=name))
        assert says in str(outcome)
    (twin,) = ask(engine, replace(versions["a0"], adapter="twin"))
    assert isinstance(twin, RowResult)
    engine.evict(twin.version)
    sources.broken = {}
    (again,) = ask(engine, versions["a0"])  # at once: this node has a copy
    assert isinstance(again, RowResult)


# -- closing -------------------------------------------------------------------------------------------------------


def test_what_is_in_use_when_the_engine_closes_goes_with_its_last_lease(make: Any) -> None:
    engine, versions = make()
    for name in ("a0", "a1"):
        engine._residency.acquire(versions[name])
    engine.evict(versions["a0"].digest)
    engine.close()
    assert len(engine.residency()) == 2
    for name in ("a0", "a1"):
        engine._residency.release(versions[name].digest)
    assert engine.residency() == [] and engine.capacity().device_used == 0


def test_what_comes_after_the_engine_has_closed_is_not_kept(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    thread, answers = asking(engine, away(versions["a0"], "s3://bucket/a0"))
    assert sources.entered.acquire(timeout=WAIT_S)
    engine.close()
    sources.go_on.set()
    thread.join(WAIT_S)
    assert isinstance(answers[0], AdapterUnavailable)
    _wait_until(lambda: not engine._residency._loading._far._lanes)
    assert engine.residency() == []


# -- tiers ---------------------------------------------------------------------------------------------------------


def test_evicted_adapters_come_back_from_host_memory(make: Any, sources: Sources) -> None:
    engine, versions = make(adapter_memory_bytes=3 * ONE)
    expected = [result.logits for result in ask(engine, *versions.values())]
    assert sources.asked == Counter(NAMES)
    for _ in range(3):
        for result, logits in zip(ask(engine, *versions.values()), expected, strict=True):
            np.testing.assert_allclose(result.logits, logits, atol=1e-5)
    assert sources.asked == Counter(NAMES), "nothing is read twice"
    assert sample(engine, "adapter_promotions_total") > 5
    assert engine.changes(0).added == {version.digest for version in versions.values()}
    assert {held.tier for held in engine.residency()} == {"device", "host"}


def test_room_for_one_row_is_not_made_at_the_cost_of_its_neighbour(make: Any) -> None:
    engine, versions = make(adapter_memory_bytes=2 * ONE)
    for name, times in (("a2", 3), ("a0", 2), ("a1", 1)):
        for _ in range(times):
            ask(engine, versions[name])
    wanted = {versions[name].digest for name in ("a0", "a1")}
    ask(engine, versions["a2"])
    while versions["a1"].digest not in engine.resident():  # beside a2 now, and worth the least
        ask(engine, versions["a1"])
    promotions = sample(engine, "adapter_promotions_total")
    ask(engine, versions["a0"], versions["a1"])
    assert set(engine.resident()) == wanted
    assert sample(engine, "adapter_promotions_total") == promotions + 1


def test_without_host_memory_they_are_read_again(make: Any, sources: Sources) -> None:
    engine, versions = make(adapter_memory_bytes=3 * ONE, host_memory_bytes=0)
    for _ in range(2):
        ask(engine, *versions.values())
    assert sum(sources.asked.values()) > len(NAMES) + 3
    assert engine.changes(0).added == set(engine.resident())
    assert engine.capacity().host_used == 0


def test_admission_without_keeping_evicts_nobody(make: Any, adapters: dict[str, Path]) -> None:
    engine, versions = make(adapter_memory_bytes=2 * ONE, host_memory_bytes=2 * ONE)
    ask(engine, *(versions[name] for name in NAMES[:4]))
    full = engine.residency()
    stored = engine._store.admit(adapters["a7"])
    report = engine.admit("new", stored, keep=False)
    assert report.version.digest == versions["a7"].digest and report.version.base == engine.base.fingerprint
    assert {held.digest for held in engine.residency()} == {held.digest for held in full}
    engine.evict(versions["a0"].digest)
    engine.evict(versions["a1"].digest)
    engine.evict(versions["a2"].digest)
    engine.admit("new", stored, keep=False)
    assert {held.tier for held in engine.residency() if held.digest == stored.digest} == {"host"}


def test_pinned_adapters_stay(make: Any) -> None:
    engine, versions = make(adapter_memory_bytes=4 * ONE, host_memory_bytes=0)
    for name in ("a0", "a1"):
        engine.pin(versions[name])
    for _ in range(3):
        assert all(isinstance(answer, RowResult) for answer in ask(engine, *versions.values()))
        assert {versions["a0"].digest, versions["a1"].digest} <= set(engine.resident())
    assert engine.capacity().pinned == 2 * versions["a0"].num_bytes
    engine.pin(versions["a2"])
    with pytest.raises(InvalidRequest, match="unpin another"):
        engine.pin(versions["a3"])
    engine.unpin(versions["a0"].digest)
    engine.pin(versions["a3"])
    for _ in range(3):
        ask(engine, *versions.values())
    assert {held.digest for held in engine.residency() if held.pinned} == {versions[f"a{n}"].digest for n in (1, 2, 3)}
    assert all(held.leases == 0 for held in engine.residency())


def test_what_pins_leave_no_room_for_is_told_at_once(make: Any, tiny_bert: TinyBase, tmp_path: Path) -> None:
    engine, versions = make(adapter_memory_bytes=5 * ONE)
    large = engine.load_adapter("large", tiny_bert.adapter(tmp_path / "large", 2, 1, r=16)).version
    engine.evict(large.digest)
    assert 2 * ONE < large.num_bytes < 5 * ONE
    for name in ("a0", "a1", "a2"):
        engine.pin(versions[name])
    refused, fine = ask(engine, large, versions["a3"])
    assert isinstance(refused, AdapterUnavailable) and "pinned adapters hold" in str(refused)
    assert isinstance(fine, RowResult)


def test_warm_waits_and_prefetch_does_not(make: Any, sources: Sources) -> None:
    engine, versions = make()
    sources.hung = {"a0"}
    engine.prefetch(versions["a0"])
    assert sources.entered.acquire(timeout=WAIT_S)
    assert versions["a0"].digest not in engine.resident()
    sources.go_on.set()
    engine.warm(versions["a0"])
    assert versions["a0"].digest in engine.resident() and sources.asked == {"a0": 1}
    sources.broken = {"a1": AdapterUnavailable("gone")}
    engine.prefetch(versions["a1"])
    with pytest.raises(AdapterUnavailable, match="gone"):
        engine.warm(versions["a1"])
    engine.prefetch(versions["a0"])
    assert [held.leases for held in engine.residency()] == [0]


def test_an_adapter_dropped_while_rows_use_it_is_gone_after_them(make: Any) -> None:
    engine, versions = make()
    leased, before = engine._residency.acquire(versions["a0"]), engine.changes(0).revision
    engine.evict(leased.digest)
    assert [held.leases for held in engine.residency()] == [1]
    assert engine.changes(0).added == {leased.digest}
    engine._residency.release(leased.digest)
    assert engine.residency() == [] and engine.changes(before).removed == {leased.digest}
    assert isinstance(ask(engine, versions["a0"])[0], RowResult)


def test_changes_tell_a_router_what_runs_at_once(make: Any) -> None:
    engine, versions = make(adapter_memory_bytes=2 * ONE, host_memory_bytes=2 * ONE)
    known, revision = set[str](), 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        version = versions[str(rng.choice(NAMES))]
        ask(engine, version) if rng.random() < 0.8 else engine.evict(version.digest)
        change = engine.changes(revision)
        assert not change.complete or revision == 0
        known = (known - change.removed) | change.added
        revision = change.revision
        assert known == {held.digest for held in engine.residency()}


# -- memory --------------------------------------------------------------------------------------------------------


def _storages(adapter: ResidentAdapter) -> int:
    """Bytes of everything that stays in memory because of ``adapter``, whole storages however little is used."""
    tensors: list[torch.Tensor] = []
    adapter.mapped(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    for head in adapter.heads.values():
        assert isinstance(head, nn.Module | ChangedModule)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


RANKS = (4, 8, 16, 32, 64, 128, 256)
METHODS: dict[str, dict[str, Any]] = {
    "rank-1": {"r": 1},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "pooler": {"modules_to_save": ["pooler", "classifier"]},
    "embedding": {"target_modules": ["query", "word_embeddings"]},
    "tokens": {"trainable_token_indices": [7, 9, 30]},
    "pissa": {"init_lora_weights": "pissa"},
    "half": {"r": 16},
}


def test_each_rank_costs_its_own_bytes(tiny_bert: TinyBase, tmp_path: Path) -> None:
    """Heads included: at most 1.1 times what the adapter has in the dtype it is served in."""
    kinds = {**{f"r{rank}": {"r": rank} for rank in RANKS}, **METHODS}
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
        total = own = 0
        for seed, (name, lora) in enumerate(kinds.items()):
            directory = tiny_bert.adapter(tmp_path / name, 3, seed, **lora)
            if name == "half":
                edit_tensors(directory, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
            version = engine.load_adapter(name, directory).version
            resident = engine._residency.acquire(version)
            held, exact = _storages(resident), 4 * _numbers(resident)
            assert held <= 1.1 * exact, f"{name} holds {held} bytes for {exact}"
            assert 0.9 * held <= version.num_bytes <= 1.1 * held, f"{name} is counted as {version.num_bytes}"
            total, own = total + held, own + version.num_bytes
        assert engine.capacity().device_used == own and total <= 1.1 * own


def _numbers(adapter: ResidentAdapter) -> int:
    count: list[int] = []
    adapter.mapped(lambda tensor: count.append(tensor.numel()) or tensor)  # type: ignore[func-returns-value]
    return sum(count)
