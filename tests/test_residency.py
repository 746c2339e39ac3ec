"""Eviction, reloading and concurrency never change an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable
from adapter_router.types import Row, RowResult
from tests.tiny import TinyBase, random_features, weights_digest

NAMES = [f"a{i}" for i in range(6)]


@pytest.fixture(scope="module")
def adapters(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: tiny_bert.adapter(folder / name, 2 + i, i, r=4 << (i % 4)) for i, name in enumerate(NAMES)}


@pytest.fixture
def small_engine(tiny_bert: TinyBase, adapters: dict[str, Path]) -> Iterator[Engine]:
    """Room for two or three of the six adapters."""
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=60_000)) as engine:
        for name, directory in adapters.items():
            engine.load_adapter(name, directory)
        yield engine


@pytest.fixture(scope="module")
def expected(tiny_bert: TinyBase, adapters: dict[str, Path]) -> dict[str, np.ndarray]:
    """Each adapter's answer in an engine of its own."""
    answers = {}
    for name, directory in adapters.items():
        with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
            engine.load_adapter(name, directory)
            (result,) = engine.infer([Row(FEATURES, name)])
            answers[name] = result.logits  # type: ignore[union-attr]
    return answers


FEATURES = random_features(np.random.default_rng(3))


def check(results: list[object], names: list[str], expected: dict[str, np.ndarray]) -> None:
    for name, result in zip(names, results, strict=True):
        assert isinstance(result, RowResult), result
        np.testing.assert_allclose(result.logits, expected[name], atol=1e-5)


def test_more_adapters_in_a_batch_than_fit(small_engine: Engine, expected: dict[str, np.ndarray]) -> None:
    for _ in range(3):
        check(small_engine.infer([Row(FEATURES, name) for name in NAMES]), NAMES, expected)
    sample = small_engine.metrics.registry.get_sample_value
    assert (sample("adapter_router_adapter_evictions_total") or 0) > 0
    assert 0 < (sample("adapter_router_resident_bytes") or 0) <= 60_000


def test_any_load_order_gives_the_same_answers(
    tiny_bert: TinyBase, adapters: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    for seed in range(3):
        order = list(np.random.default_rng(seed).permutation(NAMES))
        with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as engine:
            for name in order:
                engine.load_adapter(name, adapters[name])
            check(engine.infer([Row(FEATURES, name) for name in NAMES]), NAMES, expected)


def test_evicted_adapters_come_back_the_same(small_engine: Engine, expected: dict[str, np.ndarray]) -> None:
    for _ in range(2):
        for digest in small_engine.resident():
            small_engine.evict(digest)
        assert small_engine.resident() == []
        check(small_engine.infer([Row(FEATURES, name) for name in NAMES]), NAMES, expected)


def test_many_threads_little_room(small_engine: Engine, expected: dict[str, np.ndarray]) -> None:
    """Eight threads, every batch larger than the memory, names coming and going: no wrong answer, no deadlock."""
    before = weights_digest(small_engine.base.model)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(15):
                names = [str(name) for name in rng.choice(NAMES, rng.integers(1, 8))]
                check(small_engine.infer([Row(FEATURES, name) for name in names]), names, expected)
                if rng.random() < 0.3:
                    small_engine.evict(small_engine.resident()[0] if small_engine.resident() else "none")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert failures == []
    assert weights_digest(small_engine.base.model) == before


def test_an_adapter_whose_copy_was_damaged_fails_alone(
    small_engine: Engine, adapters: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    report = small_engine.load_adapter("victim", adapters["a0"])
    weights = report.version.directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    small_engine.evict(report.version.digest)
    victim, neighbour = small_engine.infer([Row(FEATURES, "victim"), Row(FEATURES, "a1")])
    assert isinstance(victim, AdapterUnavailable)
    check([neighbour], ["a1"], expected)


def test_the_source_may_vanish_after_loading(tiny_bert: TinyBase, engine: Engine, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "a", 3, 7)
    report = engine.load_adapter("a", directory)
    (before,) = engine.infer([Row(FEATURES, "a")])
    weights = directory / "adapter_model.safetensors"
    with weights.open("r+b") as file:  # in place, as an impatient trainer would
        file.truncate(64)
    engine.evict(report.version.digest)
    (after,) = engine.infer([Row(FEATURES, "a")])
    np.testing.assert_array_equal(before.logits, after.logits)  # type: ignore[union-attr]


def test_an_adapter_larger_than_the_memory_is_refused(tiny_bert: TinyBase, adapters: dict[str, Path]) -> None:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", adapter_memory_bytes=5_000)) as engine:
        with pytest.raises(AdapterRejected, match="adapter_memory_bytes is 5000"):
            engine.load_adapter("a3", adapters["a3"])
        (gone,) = engine.infer([Row(FEATURES, "a3")])
        assert isinstance(gone, AdapterNotFound)


def test_two_names_for_one_content_share_memory(engine: Engine, adapters: dict[str, Path]) -> None:
    first = engine.load_adapter("x", adapters["a0"], labels=["p", "q"])
    second = engine.load_adapter("y", adapters["a0"], labels=["r", "s"])
    assert first.version.digest == second.version.digest and len(engine.resident()) == 1
    x, y = engine.infer([Row(FEATURES, "x"), Row(FEATURES, "y")])
    assert x.output["label"] in "pq" and y.output["label"] in "rs"  # type: ignore[union-attr]
    engine.unload_adapter("x")
    assert len(engine.resident()) == 1, "the other name still needs it"


def test_two_engines_in_one_process(tiny_bert: TinyBase, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = TinyBase("bert", tmp_path / "other", seed=9)
    theirs = other.adapter(tmp_path / "b", 4, 3)
    with (
        Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu")) as one,
        Engine(EngineConfig(base=str(other.directory), device="cpu")) as two,
    ):
        one.load_adapter("a0", adapters["a0"])
        two.load_adapter("b", theirs)
        alone = [one.infer([Row(FEATURES, "a0")])[0], two.infer([Row(FEATURES, "b")])[0]]
        results: dict[int, list[object]] = {0: [], 1: []}

        def work(number: int, engine: Engine, name: str) -> None:
            results[number] += [engine.infer([Row(FEATURES, name)])[0] for _ in range(30)]

        threads = [threading.Thread(target=work, args=args, daemon=True) for args in ((0, one, "a0"), (1, two, "b"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        for number in (0, 1):
            for result in results[number]:
                np.testing.assert_array_equal(result.logits, alone[number].logits)  # type: ignore[attr-defined, union-attr]
        assert len(results[0]) == len(results[1]) == 30


def test_an_adapter_dropped_while_it_is_being_loaded_is_loaded_again(
    small_engine: Engine, adapters: dict[str, Path], expected: dict[str, np.ndarray]
) -> None:
    """The window between an adapter's conversion and the end of its load, held open."""
    version = small_engine.load_adapter("again", adapters["a0"]).version
    small_engine.evict(version.digest)
    converted, go_on = threading.Event(), threading.Event()
    loaded = small_engine.metrics.loaded

    def hold(seconds: float) -> None:
        loaded(seconds)
        converted.set()
        go_on.wait(10)

    small_engine.metrics.loaded = hold  # type: ignore[method-assign]
    small_engine._residency.prefetch(version)
    assert converted.wait(10)
    small_engine.evict(version.digest)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.extend(small_engine.infer([Row(FEATURES, "again")])), daemon=True)
    asking.start()
    small_engine.metrics.loaded = loaded  # type: ignore[method-assign]
    go_on.set()
    asking.join(timeout=30)
    check(answers, ["a0"], expected)
    assert small_engine._residency._tiers.slots.leases(version.digest) == 0
