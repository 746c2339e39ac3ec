"""Rows that nobody waits for: never encoded, never computed, and no difference to the rows beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from adapter_router.engine import Engine
from adapter_router.engine.callers import Callers
from adapter_router.errors import AdapterRouterError, DeadlineExceeded, InputTooLong, Overloaded
from adapter_router.types import AdapterVersion, Row, RowOutcome, RowResult
from tests.local_app import local_app
from tests.recorder import Recorder, encodings, sample, tenants_engine
from tests.sources.conftest import CONFIG, WEIGHTS, quick
from tests.sources.web_server import WebServer, hang
from tests.tiny import TinyBase, random_features

LATE = DeadlineExceeded("too late")


@pytest.fixture
def asked(engine: Engine, tiny_bert: TinyBase, tmp_path: Path) -> tuple[list[Row], list[AdapterVersion]]:
    """Six rows of three adapters, and their versions."""
    rng = np.random.default_rng(7)
    versions = [
        engine.load_adapter(name, tiny_bert.adapter(tmp_path / name, labels, labels)).version
        for name, labels in (("a", 2), ("b", 3), ("c", 4))
    ] * 2
    return [Row(random_features(rng), version.adapter) for version in versions], versions


def check_alike(outcomes: Sequence[RowOutcome], alone: Sequence[RowOutcome]) -> None:
    for outcome, expected in zip(outcomes, alone, strict=True):
        assert isinstance(outcome, RowResult) and isinstance(expected, RowResult)
        np.testing.assert_allclose(outcome.logits, expected.logits, atol=1e-5)


class Asks:
    """Says that ``late`` rows are gone from the ``turn``-th question on, and counts the questions."""

    def __init__(self, late: set[int], turn: int) -> None:
        self.late = late
        self.turn = turn
        self.times: Counter[int] = Counter()

    def __call__(self, index: int) -> AdapterRouterError | None:
        self.times[index] += 1
        return LATE if index in self.late and self.times[index] >= self.turn else None


@pytest.mark.parametrize("turn", [1, 2], ids=["before it is encoded", "before its forward"])
def test_a_late_row_takes_no_part_and_changes_nothing_for_the_others(
    engine: Engine, asked: tuple[list[Row], list[AdapterVersion]], turn: int
) -> None:
    rows, versions = asked
    alone = [engine.infer_versions([row], [version])[0] for row, version in zip(rows, versions, strict=True)]
    forwards, computed = sample(engine, "forwards_total"), sample(engine, "forward_rows_sum")
    asks = Asks({0, 4}, turn)
    outcomes = engine.infer_versions(rows, versions, asks)
    assert [outcomes[0], outcomes[4]] == [LATE, LATE]
    kept = [1, 2, 3, 5]
    check_alike([outcomes[index] for index in kept], [alone[index] for index in kept])
    assert sample(engine, "forwards_total") - forwards == 1
    assert sample(engine, "forward_rows_sum") - computed == len(kept)
    assert sample(engine, "rows_skipped_total", code="deadline_exceeded") == 2
    assert asks.times == Counter(dict.fromkeys(range(6), 2) | dict.fromkeys((0, 4), turn))


@pytest.mark.parametrize("turn", [1, 2])
def test_when_nobody_waits_nothing_is_computed(
    engine: Engine, asked: tuple[list[Row], list[AdapterVersion]], turn: int
) -> None:
    rows, versions = asked
    assert engine.infer_versions(rows, versions, Asks(set(range(6)), turn)) == [LATE] * 6
    assert sample(engine, "forwards_total") == 0
    check_alike(engine.infer_versions(rows, versions), engine.infer_versions(rows, versions))


def test_time_that_passes_while_the_model_is_busy_counts(
    engine: Engine, asked: tuple[list[Row], list[AdapterVersion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row, *_), (version, *_) = asked
    now = [100.0]

    @contextmanager
    def behind_another_forward(lock: AbstractContextManager[Any]) -> Iterator[None]:
        now[0] += 0.25
        with lock:
            yield

    monkeypatch.setattr(engine.base, "lock", behind_another_forward(engine.base.lock))
    rows = [row, Row(row.inputs, row.adapter, timeout_s=0.25)]
    answered, late = engine.infer_versions(rows, [version] * 2, Callers(rows, lambda: now[0]).gone)
    assert isinstance(answered, RowResult)
    assert isinstance(late, DeadlineExceeded) and "0.25 s" in late.message
    assert sample(engine, "forward_rows_sum") == 1


def test_a_call_that_is_given_up_is_left_alone(engine: Engine, asked: tuple[list[Row], list[AdapterVersion]]) -> None:
    rows, versions = asked
    callers = Callers(rows)
    callers.hang_up()
    outcomes = engine.infer_versions(rows, versions, callers.gone)
    assert all(isinstance(outcome, AdapterRouterError) and outcome.code == "cancelled" for outcome in outcomes)
    assert sample(engine, "forwards_total") == 0 and sample(engine, "rows_skipped_total", code="cancelled") == 6


def test_the_library_keeps_to_a_rows_time(engine: Engine, asked: tuple[list[Row], list[AdapterVersion]]) -> None:
    row = asked[0][0]
    late, in_time = engine.infer([Row(row.inputs, row.adapter, timeout_s=seconds) for seconds in (0, 3600)])
    assert isinstance(late, DeadlineExceeded) and isinstance(in_time, RowResult)


# -- one encoding for many adapters ------------------------------------------------------------------------------------

TEXT = "742 Maple Street, Springfield"


@pytest.fixture(scope="module")
def tenants() -> Iterator[Engine]:
    with tenants_engine() as engine:
        yield engine


@pytest.fixture
def encoded(tenants: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    return encodings(tenants, monkeypatch)


def test_what_several_adapters_are_asked_about_is_tokenised_once(tenants: Engine, encoded: list[Row]) -> None:
    names = ["language", "guardrail", "addresses", "intent-search"]
    alone = [tenants.infer([Row(TEXT, name)])[0] for name in names]
    encoded.clear()
    check_alike(tenants.infer([Row(TEXT, name) for name in names]), alone)
    assert len(encoded) == 1


def test_rows_that_are_encoded_differently_do_not_share(tenants: Engine, encoded: list[Row]) -> None:
    ids = {"input_ids": np.array([101, 7592, 102])}
    cut, other = {"truncate_prompt_tokens": 5}, {"prefix": "query: "}
    rows = [
        Row(TEXT, "language"),
        Row(TEXT, "guardrail", parameters=cut),
        Row(TEXT, "language", parameters=cut),
        Row(TEXT, "intent-search", parameters=other),
        Row((TEXT, TEXT), "guardrail"),
        Row(ids, "language"),
        Row(ids, "guardrail"),
        Row(TEXT, "guardrail", parameters={"truncate_prompt_tokens": True}),
        Row(TEXT, "guardrail", parameters={"truncate_prompt_tokens": [5]}),
    ]
    alone = [tenants.infer([row])[0] for row in rows]
    encoded.clear()
    outcomes = tenants.infer(rows)
    check_alike(outcomes[:-2], alone[:-2])
    assert [type(outcome) for outcome in outcomes[-2:]] == [type(outcome) for outcome in alone[-2:]]
    assert len(encoded) == len(rows) - 1


def test_a_text_that_is_refused_is_refused_for_every_adapter(tenants: Engine, encoded: list[Row]) -> None:
    first, second = tenants.infer([Row("word " * 600, name) for name in ("language", "guardrail")])
    assert isinstance(first, InputTooLong) and isinstance(second, InputTooLong) and first is not second
    assert first.message == second.message and len(encoded) == 1


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(tenants: Engine) -> Recorder:
    return Recorder(tenants)


@pytest.fixture
def http(recorder: Recorder) -> Iterator[TestClient]:
    with recorder.client() as client:
        yield client


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/classify": {"model": "language", "input": ["a", "b"]},
    "/v1/classify_multi": {"models": ["language", "addresses"], "input": "a"},
    "/v1/token-classify": {"model": ["addresses"], "input": "a"},
    "/v1/question-answer": {"model": "address-questions", "question": "a?", "context": "a"},
    "/v1/embeddings": {"model": "intent-search", "input": "a"},
    "/v1/score": {"model": "intent-search", "text_1": "a", "text_2": "b"},
    "/v1/rerank": {"model": "intent-search", "query": "a", "documents": ["b"]},
    "/v1/image-classify": {"model": "language", "input": "AAAA"},
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_takes_the_callers_tenant_time_and_priority(
    http: TestClient, recorder: Recorder, path: str
) -> None:
    headers = {"x-tenant": "a tenant", "x-request-timeout-ms": "3600000", "x-request-timeout-seconds": "1"}
    http.post(path, json={**ROUTES[path], "priority": -3}, headers=headers)
    assert recorder.rows and {(row.tenant, row.priority) for row in recorder.rows} == {("a tenant", -3)}
    assert all(row.timeout_s is not None and 3000 < row.timeout_s <= 3600 for row in recorder.rows)
    recorder.calls.clear()
    http.post(path, json=ROUTES[path])
    assert {(row.tenant, row.priority, row.timeout_s) for row in recorder.rows} == {("", 0, None)}
    assert http.post(path, json={**ROUTES[path], "priority": "high"}).status_code == 400


@pytest.mark.parametrize(
    ("value", "seconds"), [("3600", 3600), ("0", None), ("-1", None), ("soon", None), ("inf", None)]
)
def test_serves_own_header_means_what_it_means_to_serve(
    http: TestClient, recorder: Recorder, value: str, seconds: float | None
) -> None:
    http.post("/v1/classify", json=ROUTES["/v1/classify"], headers={"x-request-timeout-seconds": value})
    assert recorder.rows[0].timeout_s == (pytest.approx(seconds, abs=60) if seconds else None)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-request-timeout-ms", b"0"),
        ("x-request-timeout-ms", b"-5"),
        ("x-request-timeout-ms", b"soon"),
        ("x-request-timeout-ms", b"1.5"),
        ("x-request-timeout-ms", b"9" * 400),
        ("x-tenant", b"t" * 129),
        ("x-tenant", b"no\xa0break"),
    ],
)
def test_a_bad_header_is_named(http: TestClient, recorder: Recorder, header: str, value: bytes) -> None:
    response = http.post("/v1/classify", json=ROUTES["/v1/classify"], headers={header.encode(): value})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, header) and header in str(error["problems"])
    assert recorder.calls == []


def test_a_request_whose_time_is_over_is_answered_504(http: TestClient, tenants: Engine) -> None:
    before = sample(tenants, "forwards_total")
    response = http.post("/v1/classify", json=ROUTES["/v1/classify"], headers={"x-request-timeout-seconds": "1e-9"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert sample(tenants, "forwards_total") == before


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (2.0, "2"), (2.01, "3"), (float("inf"), "3600")])
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/classify_multi", "/v1/rerank"])
def test_who_comes_too_much_is_told_when_to_come_again(
    http: TestClient, recorder: Recorder, path: str, seconds: float, header: str
) -> None:
    recorder.error = Overloaded("full", retry_after_s=seconds)
    response = http.post(path, json=ROUTES[path])
    assert (response.status_code, response.headers["retry-after"]) == (429, header)
    assert response.json()["error"]["code"] == "overloaded"


# -- adapters that are not there yet -----------------------------------------------------------------------------------


def test_the_time_to_fetch_an_adapter_counts(tiny_bert: TinyBase, tmp_path: Path) -> None:
    directory = tiny_bert.adapter(tmp_path / "adapter", 2, 1)
    with closing(WebServer()) as web:
        for name in ("hangs", "here"):
            for file in (CONFIG, WEIGHTS):
                web.site.files[f"/{name}/{file}"] = (directory / file).read_bytes()
        web.site.fail(f"/hangs/{CONFIG}", *[hang] * 9)
        sources = quick(f"http://localhost:{web.port}/", idle_timeout_s=20, attempts=1)
        with local_app(tmp_path / "app", tiny_bert.directory, catalog={"sources": sources}) as app:
            for name in ("hangs", "here"):
                body = {"name": name, "uri": f"{web.url}/{name}", "lazy": True}
                assert app.http.post("/v1/adapters", json=body).is_success
            tokens = {"input_ids": np.array([5, 6, 7])}
            rows = [Row(tokens, "hangs", timeout_s=0.2), Row(tokens, "here", timeout_s=3600), Row(tokens, "here")]
            late, *answered = app.run(app.router.infer_many(rows))
            assert isinstance(late, DeadlineExceeded) and "hangs" in late.message and "0.2 s" in late.message
            assert all(isinstance(outcome, RowResult) for outcome in answered)
            for path in ("classify", "classify_multi"):
                asked = {"model": ["hangs"]} if path == "classify" else {"models": ["hangs"]}
                response = app.http.post(
                    f"/v1/{path}", json={**asked, "input": "x"}, headers={"x-request-timeout-ms": "200"}
                )
                assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert app.http.get("/v1/adapters/hangs").json()["phase"] not in (
                "Ready",
                "Failed",
            )  # it hangs all the while
