"""What shall be served over HTTP: manifests that are posted or configured, drift, and what ``/readyz`` says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adapter_router.catalog.records import AdapterSpec
from adapter_router.errors import CatalogUnavailable
from adapter_router.types import Row, RowResult, Source
from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.test_admin_api import ask, directory, name, refused, register
from tests.tiny import TinyBase, edit_config

__all__ = ["directory", "name"]


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory) as app:
        yield app


def post(local: LocalApp, manifest: Any, status: int = 200, **query: Any) -> Any:
    content = manifest if isinstance(manifest, bytes) else yaml.safe_dump(manifest).encode()
    response = local.http.post("/v1/manifest", content=content, params=query)
    assert response.status_code == status, response.text
    return response.json()


def kinds(answer: Any) -> dict[str, str]:
    return {difference["name"]: difference["kind"] for difference in answer["data"]}


def phase(local: LocalApp, name: str) -> Any:
    return ask(local, "GET", f"/v1/adapters/{name}")["phase"]


def test_a_posted_manifest_is_brought_about(local: LocalApp, name: str, directory: Path) -> None:
    register(local, "by-hand", directory)
    one = {"name": name, "uri": str(directory), "labels": ["x", "y", "z"]}
    dry = post(local, [one], dry_run=True)
    assert kinds(dry) == {name: "added"} and not dry["applied"]
    refused(local, "GET", f"/v1/adapters/{name}", None, 404)
    assert kinds(post(local, {"adapters": [one]})) == {name: "added"}
    wait_for(lambda: phase(local, name) == "Ready")
    assert ask(local, "GET", f"/v1/adapters/{name}")["managed"]
    assert post(local, [one]) == {"object": "list", "applied": True, "data": []}
    (changed,) = post(local, [{**one, "labels": ["a", "b", "c"], "pinned": True}])["data"]
    assert changed["kind"] == "changed" and changed["fields"] == {
        "labels": {"registered": ["x", "y", "z"], "declared": ["a", "b", "c"]},
        "pinned": {"registered": False, "declared": True},
    }
    wait_for(lambda: [entry["pinned"] for entry in _held(local, name)] == [True])
    now = {**one, "labels": ["a", "b", "c"], "pinned": True}
    (moved,) = post(local, [{"name": "by-hand", "uri": "/elsewhere"}, now])["data"]
    assert moved["kind"] == "conflict" and "by hand" in moved["reason"]
    assert kinds(post(local, [])) == {name: "removed"}
    refused(local, "GET", f"/v1/adapters/{name}", None, 404)
    assert [entry["pinned"] for entry in _held(local, "by-hand")] == [False], "the content is nobody's pin any more"
    assert phase(local, "by-hand") == "Ready", "what was registered by hand is left alone"


def test_pins_follow_a_manifest(local: LocalApp, name: str, directory: Path) -> None:
    one = {"name": name, "uri": str(directory)}
    post(local, [one])
    wait_for(lambda: phase(local, name) == "Ready")
    post(local, [{**one, "pinned": True}])
    assert [entry["pinned"] for entry in _held(local, name)] == [True]
    post(local, [one])
    assert [entry["pinned"] for entry in _held(local, name)] == [False]


def _held(local: LocalApp, name: str) -> list[Any]:
    entries = ask(local, "GET", "/v1/adapters", params={"view": "residency"})["data"]
    return [entry for entry in entries if name in entry["adapters"]]


@pytest.mark.parametrize(
    ("manifest", "fragments"),
    [
        (b"- {name: a", ["no YAML"]),
        (b"\xff\xfe", ["UTF-8"]),
        (b"", ["send a manifest"]),
        (b" \n", ["send a manifest"]),
        (
            [{"name": "a@v1", "uri": "/x"}, {"name": "b"}, {"name": "c", "uri": "/x", "color": 1}],
            ["a@v1", "uri", "color"],
        ),
        ([{"name": "a", "uri": "/x"}, {"name": "a", "uri": "/y"}], ["twice"]),
        (
            [{"name": "a", "uri": "https://me:hunter2@host/x"}, {"name": "b", "uri": "ftp://x"}],
            ["a: ", "b: ", "secretRef"],
        ),
        ({"models": []}, ["models"]),
        (b"a" * ((16 << 20) + 1), ["more than"]),
    ],
)
def test_a_manifest_that_cannot_be(local: LocalApp, manifest: Any, fragments: list[str]) -> None:
    before = ask(local, "GET", "/v1/events")["revision"]
    text = str(post(local, manifest, 400))
    assert all(fragment in text for fragment in fragments), text
    assert "hunter2" not in text
    assert ask(local, "GET", "/v1/events")["revision"] == before, "nothing was written"


def test_a_base_is_no_adapter_in_a_manifest_either(local: LocalApp, tiny_bert: TinyBase) -> None:
    assert "base model's" in str(post(local, [{"name": str(tiny_bert.directory), "uri": "/x"}], 400))


def test_without_a_configured_declaration_there_is_no_drift(local: LocalApp) -> None:
    assert ask(local, "GET", "/v1/manifest") == {"object": "list", "configured": False, "error": None, "data": []}
    assert "dry" in refused(local, "POST", "/v1/manifest", None, 400, params={"dry": 1})


def test_the_configured_declaration_is_kept(
    tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.declared._WATCH_S", 0.05)
    good, bad = (tiny_bert.adapter(tmp_path / kind, 2, 1) for kind in ("good", "bad"))
    edit_config(bad, r=-1)
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump([{"name": "good", "uri": str(good), "preload": True}]))
    declared = [AdapterSpec("bad", Source(str(bad)))]
    with local_app(tmp_path, tiny_bert.directory, declared=declared, catalog={"manifest": manifest}) as app:
        ready = ask(app, "GET", "/readyz")
        assert ready["ready"] and set(ready["failed_adapters"]) == {"bad"}
        assert "r is -1" in str(ready["failed_adapters"]["bad"]["problems"]) and "manifest_error" not in ready
        assert _held(app, "good") and ask(app, "GET", "/v1/manifest")["data"] == []

        assert "in its configuration" in str(post(app, [], 400))
        ask(app, "DELETE", "/v1/adapters/good")
        drift = ask(app, "GET", "/v1/manifest")
        assert drift["configured"] and kinds(drift) == {"good": "added"}
        assert kinds(post(app, b"", dry_run=True)) == {"good": "added"}
        assert kinds(post(app, b"")) == {"good": "added"}
        wait_for(lambda: phase(app, "good") == "Ready")

        manifest.write_text("- {name: good, uri: /x, colour: red}")
        wait_for(lambda: "manifest_error" in ask(app, "GET", "/readyz"))
        broken = ask(app, "GET", "/readyz")
        assert "colour" in broken["manifest_error"] and broken["ready"]
        assert "colour" in refused(app, "GET", "/v1/manifest", None, 400)
        ask(app, "PUT", "/v1/adapters/good/pin")  # many looks later it is still said, and nothing was changed
        assert "colour" in ask(app, "GET", "/readyz")["manifest_error"] and phase(app, "good") == "Ready"

        register(app, "by-hand", good)
        manifest.write_text(yaml.safe_dump([{"name": "by-hand", "uri": "/elsewhere"}]))
        wait_for(lambda: "by hand" in ask(app, "GET", "/readyz").get("manifest_error", ""))
        refused(app, "GET", "/v1/adapters/good", None, 404)
        ask(app, "DELETE", "/v1/adapters/by-hand")  # what stood in the way is gone
        wait_for(lambda: "manifest_error" not in ask(app, "GET", "/readyz"))
        assert ask(app, "GET", "/v1/adapters/by-hand")["uri"] == "/elsewhere"

        manifest.write_text(yaml.safe_dump([{"name": "good", "uri": str(good)}]))
        wait_for(lambda: app.http.get("/v1/adapters/good").is_success)
        wait_for(lambda: phase(app, "good") == "Ready")


def test_a_manifest_that_is_wrong_at_the_start_takes_nothing_away(tiny_bert: TinyBase, tmp_path: Path) -> None:
    good = tiny_bert.adapter(tmp_path / "good", 2, 1)
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump([{"name": "good", "uri": str(good), "preload": True}]))
    with local_app(tmp_path, tiny_bert.directory, catalog={"manifest": manifest}) as app:
        assert phase(app, "good") == "Ready"
    manifest.unlink()
    with local_app(tmp_path, tiny_bert.directory, catalog={"manifest": manifest}) as app:
        ready = ask(app, "GET", "/readyz")
        assert ready["ready"] and "cannot be read" in ready["manifest_error"]
        assert phase(app, "good") == "Ready" and _held(app, "good")


def test_ready_while_the_catalog_is_gone(local: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are in memory are served all the same, so the router stays in the balance."""

    def gone(*_: object) -> Any:
        raise CatalogUnavailable("the catalog's database does not answer")

    monkeypatch.setattr(local.router.adapters.catalog, "failed_declared", gone)
    ready = ask(local, "GET", "/readyz")
    assert ready["ready"] and "does not answer" in ready["catalog_error"]
    monkeypatch.setattr(local.router.adapters.catalog, "registrations", gone)
    response = local.http.get("/v1/adapters")
    assert response.status_code == 503 and response.headers["retry-after"] == "1"


def test_rows_of_known_names_are_answered_while_the_catalog_is_gone(
    local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Any:
        raise CatalogUnavailable("the catalog's database does not answer")

    register(local, name, directory)
    tokens = {"input_ids": np.asarray([1, 2, 3])}
    base = Row(tokens, str(tiny_bert.directory), "embedding")
    assert isinstance(local.run(local.router.infer(Row(tokens, name))), RowResult)
    monkeypatch.setattr(local.router.adapters.catalog, "routes_at", gone)
    rows = [Row(tokens, name), Row(tokens, "never-asked-for"), base]
    known, unknown, bare = local.run(local.router.infer_many(rows))
    assert isinstance(known, RowResult) and isinstance(bare, RowResult)
    assert unknown.code == "catalog_unavailable" and "does not answer" in str(unknown)
    response = local.http.post("/v1/classify", json={"model": "never-asked-for", "input": [[1]]})
    assert response.status_code == 503 and response.json()["error"]["code"] == "catalog_unavailable"
