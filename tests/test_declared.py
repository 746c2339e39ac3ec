"""What the configuration declares: no restart undoes what somebody has decided, and no source holds up a start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_router.catalog.declaration import parse
from adapter_router.catalog.records import AdapterSpec
from adapter_router.types import Source
from tests.local_app import local_app
from tests.serving import wait_for
from tests.sources.conftest import CONFIG, WEIGHTS, quick
from tests.sources.web_server import Handler, Request, WebServer
from tests.test_admin_api import ask, version_of
from tests.test_failing_sources import publish
from tests.tiny import TinyBase


def test_a_restart_undoes_no_rollback(tiny_bert: TinyBase, tmp_path: Path) -> None:
    source = tiny_bert.adapter(tmp_path / "source", 2, 1)
    declared = [AdapterSpec("mine", Source(str(source)))]
    with local_app(tmp_path, tiny_bert.directory, declared=declared) as app:
        good = version_of(app, "mine")
        tiny_bert.adapter(source, 2, 2)
        bad = ask(app, "POST", "/v1/adapters/mine/versions", status=201)["version"]
        assert version_of(app, "mine") == bad
        ask(app, "POST", "/v1/aliases/mine/rollback")
    with local_app(tmp_path, tiny_bert.directory, declared=declared) as app:
        assert version_of(app, "mine") == good, "somebody has turned away from what lies at the source"
        ask(app, "PUT", "/v1/aliases/mine", {"v1": 90, "v2": 10})
    tiny_bert.adapter(source, 2, 3)
    with local_app(tmp_path, tiny_bert.directory, declared=declared) as app:
        newest = ask(app, "GET", "/v1/adapters/mine/versions/3")
        assert version_of(app, "mine") == newest["version"] not in {good, bad} and newest["share"] == 1.0


def test_a_start_waits_for_no_slow_source(tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.declared._LOOK_S", 0.1)
    answered = threading.Event()

    def slow(handler: Handler, _: Request) -> bool:
        handler.site.closing.wait(20)
        answered.set()
        handler.close_connection = True
        return True

    web = WebServer()
    try:
        sources = quick(f"http://localhost:{web.port}/", idle_timeout_s=100, attempts=1)
        declared = [AdapterSpec("far", Source(publish(web, "far", tiny_bert.adapter(tmp_path / "far", 2, 1))))]
        with local_app(tmp_path, tiny_bert.directory, declared=declared, catalog={"sources": sources}) as app:
            known = version_of(app, "far")
        publish(web, "far", tiny_bert.adapter(tmp_path / "far", 2, 2))
        for file in (CONFIG, WEIGHTS):
            web.site.fail(f"/far/{file}", slow)
        with local_app(tmp_path, tiny_bert.directory, declared=declared, catalog={"sources": sources}) as app:
            assert version_of(app, "far") == known and not answered.is_set()
            wait_for(lambda: len(web.site.asked("GET", CONFIG)) + len(web.site.asked("GET", WEIGHTS)) > 2)
    finally:
        web.close()


def test_manifests_are_read_beside_the_event_loop(
    tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of adapters in YAML take seconds, which everybody's rows would wait."""
    threads: list[threading.Thread] = []

    def noted(text: str) -> list[AdapterSpec]:
        threads.append(threading.current_thread())
        return parse(text)

    async def its_thread() -> threading.Thread:
        return threading.current_thread()

    monkeypatch.setattr("deployments.declared.parse", noted)
    with local_app(tmp_path / "posted", tiny_bert.directory) as app:
        assert app.http.post("/v1/manifest?dry_run=true", content=b"[]").is_success
        assert len(threads) == 1 and app.run(its_thread()) not in threads
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("[]")
    with local_app(tmp_path / "configured", tiny_bert.directory, catalog={"manifest": manifest}) as app:
        assert app.http.get("/v1/manifest").is_success
        assert len(threads) > 1 and app.run(its_thread()) not in threads


def test_a_manifest_is_watched_whatever_happens(
    tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.declared._WATCH_S", 0.05)
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("[]")
    with local_app(tmp_path, tiny_bert.directory, catalog={"manifest": manifest}) as app:
        catalog = app.router.adapters.catalog
        reconcile, faults = catalog.reconcile, [RuntimeError("a fault of ours")]

        def once(declared: Any) -> Any:
            if faults:
                raise faults.pop()
            return reconcile(declared)

        monkeypatch.setattr(catalog, "reconcile", once)
        good = tiny_bert.adapter(tmp_path / "good", 2, 1)
        manifest.write_text(yaml.safe_dump([{"name": "good", "uri": str(good)}]))
        wait_for(lambda: app.http.get("/v1/adapters/good").is_success, 20)
        assert not faults
        wait_for(lambda: "manifest_error" not in ask(app, "GET", "/readyz"), 20)
