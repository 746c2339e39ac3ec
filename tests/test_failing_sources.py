"""Broken sources seen by callers: their own rows get 424 or 503 with the reason, and nobody else waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapter_router.types import Row
from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.sources.conftest import CONFIG, WEIGHTS, quick
from tests.sources.web_server import WebServer, cut, hang, status
from tests.tiny import TinyBase

_IDLE_S = 4.0  # after which a source that says nothing is given up


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.close()


@pytest.fixture
def app(tiny_bert: TinyBase, web: WebServer, tmp_path: Path) -> Iterator[LocalApp]:
    sources = quick(f"http://localhost:{web.port}/", idle_timeout_s=_IDLE_S, attempts=1)
    with local_app(tmp_path / "app", tiny_bert.directory, catalog={"sources": sources}) as app:
        yield app


def publish(web: WebServer, name: str, directory: Path) -> str:
    for file in (CONFIG, WEIGHTS):
        web.site.files[f"/{name}/{file}"] = (directory / file).read_bytes()
    return f"{web.url}/{name}"


def ask(app: LocalApp, model: str) -> httpx.Response:
    with httpx.Client(base_url=app.url, timeout=60) as http:
        return http.post("/v1/classify", json={"model": model, "input": [5, 6, 7]})


def test_a_source_that_fails_costs_only_its_own_rows(
    app: LocalApp, web: WebServer, tiny_bert: TinyBase, tmp_path: Path
) -> None:
    directory = Path(tiny_bert.adapter(tmp_path / "adapter", 2, 1))
    cold = {f"good-{seed}": Path(tiny_bert.adapter(tmp_path / f"good-{seed}", 2, 10 + seed)) for seed in range(4)}
    addresses = {name: publish(web, name, directory) for name in ("hot", "hangs", "fails", "cut", "corrupt", "missing")}
    addresses |= {name: publish(web, name, folder) for name, folder in cold.items()}
    for _ in range(50):
        web.site.fail(f"/hangs/{CONFIG}", hang)
        web.site.fail(f"/fails/{WEIGHTS}", status(500))
        web.site.fail(f"/cut/{WEIGHTS}", cut(0))
    weights = f"/corrupt/{WEIGHTS}"
    web.site.files[weights] = web.site.files[weights][:-40] + b"\xff" * 40
    del web.site.files[f"/missing/{WEIGHTS}"]
    for name, uri in addresses.items():
        response = app.http.post("/v1/adapters", json={"name": name, "uri": uri, "lazy": True})
        assert response.is_success, response.text
    assert ask(app, "hot").is_success

    expected = {"hangs": 503, "fails": 503, "cut": 503, "corrupt": 424, "missing": 424}
    with ThreadPoolExecutor(32) as callers:
        broken = {name: [callers.submit(ask, app, name) for _ in range(3)] for name in expected}
        wait_for(lambda: any(request.path == f"/hangs/{CONFIG}" for request in web.site.requests))
        # While that one hangs: a hot adapter answers again and again, and cold ones come in.
        hot = [ask(app, "hot") for _ in range(20)]
        came = [callers.submit(ask, app, name) for name in cold]
        assert all(answer.result(60).is_success for answer in came)
        assert not any(answer.done() for answer in broken["hangs"]), "it hung for too short a time to prove anything"
        assert all(answer.is_success for answer in hot)
        answers = {name: [answer.result(60) for answer in waiting] for name, waiting in broken.items()}
    for name, wanted in expected.items():
        for answer in answers[name]:
            assert answer.status_code == wanted, (name, answer.text)
            error = answer.json()["error"]
            assert name in error["message"] and error["code"], error
            assert ("retry-after" in answer.headers) == (wanted == 503)
    shown = app.http.get("/v1/adapters/corrupt").json()
    assert shown["phase"] == "Failed" and shown["attempts"] == 1


def test_a_source_that_heals_serves_by_itself(
    app: LocalApp, web: WebServer, tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_router.catalog.registrar._FIRST_RETRY_S", 0.2)
    uri = publish(web, "heals", Path(tiny_bert.adapter(tmp_path / "adapter", 2, 1)))
    web.site.fail(f"/heals/{WEIGHTS}", status(500), status(500))
    assert app.http.post("/v1/adapters", json={"name": "heals", "uri": uri}).is_success
    wait_for(lambda: app.http.get("/v1/adapters/heals").json()["phase"] == "Ready")
    assert ask(app, "heals").is_success


def test_rows_of_one_call_do_not_wait_for_each_others_sources(
    app: LocalApp, web: WebServer, tiny_bert: TinyBase, tmp_path: Path
) -> None:
    """One handle call with a row of a hanging adapter and rows of others: those are answered on the replica at once."""
    directory = Path(tiny_bert.adapter(tmp_path / "adapter", 2, 1))
    for name in ("hot", "hangs"):
        uri = publish(web, name, directory)
        assert app.http.post("/v1/adapters", json={"name": name, "uri": uri, "lazy": True}).is_success
    web.site.fail(f"/hangs/{CONFIG}", hang, hang)
    assert ask(app, "hot").is_success
    done = threading.Event()

    def call() -> list[object]:
        outcomes: list[object] = app.run(app.router.infer_many([Row("x", "hangs"), Row("x", "nobody")]))
        done.set()
        return outcomes

    with ThreadPoolExecutor(1) as caller:
        outcomes = caller.submit(call)
        wait_for(lambda: any(request.path == f"/hangs/{CONFIG}" for request in web.site.requests))
        assert ask(app, "hot").is_success and not done.is_set()
        failed, unknown = outcomes.result(60)
    assert failed.code == "adapter_unavailable" and unknown.code == "model_not_found"  # type: ignore[attr-defined]
