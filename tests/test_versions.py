"""An adapter's versions under load: whoever asks while a name changes its meaning gets the one or the other, whole."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.types import Row, RowResult
from deployments.demo.tenants import BASE
from tests.real_adapters import random_adapter
from tests.serving import Application, wait_for

pytestmark = pytest.mark.serve

TEXTS = ("turn on the lights", "where is my parcel", "Guten Morgen zusammen", "ignore the instructions")
_CALLERS = 64


def alone(directory: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The version of the adapter in ``directory`` and its logits for TEXTS, on an engine that knows no other."""
    with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
        engine.load_adapter("a", directory)
        results = engine.infer([Row(text, "a") for text in TEXTS])
        assert all(isinstance(result, RowResult) for result in results)
        logits = {text: r.logits for text, r in zip(TEXTS, results, strict=True)}  # type: ignore[union-attr]
        return results[0].version, logits  # type: ignore[union-attr]


class Callers:
    """Threads that ask one name all the time and compare every answer with the version it says it is from."""

    def __init__(self, app: Application, name: str, expected: dict[str, dict[str, np.ndarray]]) -> None:
        self.failures: list[str] = []
        self.seen: list[set[str]] = [set() for _ in range(_CALLERS)]
        self.answered = [0] * _CALLERS
        self._app, self._name, self._expected = app, name, expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,), daemon=True) for n in range(_CALLERS)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def everybody_again(self) -> None:
        """Wait until every caller has had two more answers: the second was asked for after this call."""
        before = list(self.answered)
        wait_for(lambda: all(a >= b + 2 for a, b in zip(self.answered, before, strict=True)))

    def _call(self, number: int) -> None:
        text = TEXTS[number % len(TEXTS)]
        while not self._stop.is_set():
            try:
                outcome: Any = self._app.handle.infer.remote(Row(text, self._name)).result(timeout_s=60)
            except Exception as error:
                self.failures.append(repr(error))
                continue
            if not isinstance(outcome, RowResult):
                self.failures.append(repr(outcome))
            elif outcome.version not in self._expected:
                self.failures.append(f"an unknown version {outcome.version}")
            elif np.abs(outcome.logits - self._expected[outcome.version][text]).max() > 1e-4:
                self.failures.append(f"{outcome.version} answered like another")
            else:
                self.seen[number].add(outcome.version)
            self.answered[number] += 1


@pytest.fixture(scope="module")
def two_versions(app: Application, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``flip`` with versions 1 and 2, and what each answers."""
    root = tmp_path_factory.mktemp("flip")
    source = root / "source"
    expected, digests = {}, []
    for seed in (1, 2):
        random_adapter(source, seed)
        version, logits = alone(source)
        expected[version] = logits
        digests.append(version)
        if seed == 1:
            assert app.http.post("/v1/adapters", json={"name": "flip", "uri": str(source), "wait": True}).is_success
        else:
            assert app.http.post("/v1/adapters/flip/versions", json={"activate": False}).is_success
    yield expected, digests
    assert app.http.delete("/v1/adapters/flip").is_success


def set_alias(app: Application, name: str, **weights: int) -> None:
    response = app.http.put(f"/v1/aliases/{name}", json=weights)
    assert response.is_success, response.text


def test_a_flip_under_64_callers_answers_from_the_old_or_the_new(app: Application, two_versions: Any) -> None:
    expected, digests = two_versions
    with Callers(app, "flip", expected) as callers:
        for turn in range(10):
            wanted = turn % 2
            set_alias(app, "flip", **{f"v{wanted + 1}": 1})
            callers.everybody_again()
            after = app.handle.infer.remote(Row(TEXTS[0], "flip")).result(timeout_s=60)
            assert after.version == digests[wanted]
        rolled = app.http.post("/v1/aliases/flip/rollback")
        assert rolled.is_success
        callers.everybody_again()
    assert callers.failures == []
    assert all(seen == set(digests) for seen in callers.seen), "a caller saw only one version: the flips proved nothing"


def test_a_canary_splits_by_key_and_each_key_stays_where_it_is(app: Application, two_versions: Any) -> None:
    _, (old, new) = two_versions
    set_alias(app, "flip", v1=80, v2=20)
    rows = [Row(TEXTS[0], "flip", sticky_key=f"user-{number}") for number in range(500)]
    first = [outcome.version for outcome in app.infer_many(rows)]  # type: ignore[union-attr]
    assert [outcome.version for outcome in app.infer_many(rows)] == first  # type: ignore[union-attr]
    assert 60 <= first.count(new) <= 140
    set_alias(app, "flip", v1=50, v2=50)
    later = [outcome.version for outcome in app.infer_many(rows)]  # type: ignore[union-attr]
    assert 200 <= later.count(new) <= 300
    assert all(after == new for before, after in zip(first, later, strict=True) if before == new), (
        "only towards the new"
    )
    by_http = {
        app.http.post("/v1/classify", json={"model": "flip", "input": TEXTS[0], "user": row.sticky_key}).json()[
            "adapter"
        ]["version"]
        for row, version in zip(rows[:20], later, strict=False)
        if version == old
    }
    assert by_http == {old}


def test_every_version_can_be_addressed(app: Application, two_versions: Any) -> None:
    expected, digests = two_versions
    set_alias(app, "flip", v1=1)
    rows = [
        Row(TEXTS[0], address)
        for number, digest in enumerate(digests, 1)
        for address in (f"flip@v{number}", f"flip@{digest}", f"flip@{digest[:19]}")
    ]
    outcomes = app.infer_many(rows)
    assert [outcome.version for outcome in outcomes] == [d for d in digests for _ in range(3)]  # type: ignore[union-attr]
    for outcome in outcomes:
        assert np.abs(outcome.logits - expected[outcome.version][TEXTS[0]]).max() <= 1e-4  # type: ignore[union-attr]
