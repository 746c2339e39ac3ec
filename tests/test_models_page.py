"""``GET /v1/models``: OpenAI's pages, one name at a time, and what a page costs among many adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapter_router.catalog.records import AdapterSpec
from adapter_router.types import AdapterVersion, Source
from tests.local_app import LocalApp, local_app
from tests.test_admin_api import ask, refused, register
from tests.tiny import TinyBase

MANY = 1500


@pytest.fixture(scope="module")
def bases(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    other = TinyBase("distilbert", tmp_path_factory.mktemp("tiny-distilbert"))
    return [str(tiny_bert.directory), str(other.directory)]


@pytest.fixture(scope="module")
def local(bases: list[str], tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    """Adapters of two bases, one with a split, one alias, one that failed and one that nobody has asked for."""
    root = tmp_path_factory.mktemp("local")
    distilbert = TinyBase("distilbert", root / "copy")
    with local_app(root, *map(Path, bases)) as app:
        register(app, "a/first", tiny_bert.adapter(root / "first", 3, 1), labels=["x", "y", "z"])
        register(app, "other", distilbert.adapter(root / "other", 4, 1))
        split = tiny_bert.adapter(root / "split", 2, 1)
        register(app, "split", split)
        tiny_bert.adapter(split, 3, 2)
        ask(app, "POST", "/v1/adapters/split/versions", status=201)
        ask(app, "PUT", "/v1/aliases/split", {"v1": 90, "v2": 10})
        ask(app, "PUT", "/v1/aliases/best", {"a/first@v1": 1})
        lazy = {"name": "lazy", "uri": "/x", "lazy": True, "base": bases[1], "task": "embedding"}
        ask(app, "POST", "/v1/adapters", lazy, 202)
        refused(app, "POST", "/v1/adapters", {"name": "failed", "uri": str(root), "wait": True}, 422)
        yield app


NAMES = ["a/first", "best", "failed", "lazy", "other", "split"]


def test_bases_come_first_then_every_name(local: LocalApp, bases: list[str]) -> None:
    page = ask(local, "GET", "/v1/models")
    assert [entry["id"] for entry in page["data"]] == [*bases, *NAMES]
    assert (page["object"], page["has_more"]) == ("list", False)
    assert (page["first_id"], page["last_id"]) == (bases[0], "split")
    assert all(entry["object"] == "model" and entry["owned_by"] and "created" in entry for entry in page["data"])
    parents = {entry["id"]: entry["parent"] for entry in page["data"]}
    expected = [None, None, bases[0], bases[0], None, bases[1], bases[1], bases[0]]
    assert list(parents.values()) == expected
    assert page["data"][0]["max_model_len"] == 40


def test_metadata_say_what_answers(local: LocalApp) -> None:
    entries = {entry["id"]: entry["metadata"] for entry in ask(local, "GET", "/v1/models")["data"]}
    first = entries["a/first"]
    (version,) = ask(local, "GET", "/v1/adapters/a/first/versions")["data"]
    assert first == {
        "task": "text-classification",
        "num_labels": 3,
        "labels": ["x", "y", "z"],
        "version": version["version"],
        "version_number": 1,
        "phase": "Ready",
    }
    assert entries["other"]["num_labels"] == 4
    split = entries["split"]
    assert (split["num_labels"], split["version_number"]) == (2, 1), "of the larger share"
    assert [(v["version_number"], v["weight"]) for v in split["versions"]] == [(1, 90), (2, 10)]
    best = entries["best"]
    assert best["version"] == version["version"] and best["versions"][0]["adapter"] == "a/first"
    assert (entries["failed"]["phase"], entries["failed"]["version"]) == ("Failed", None)
    assert entries["lazy"] == {
        "task": "embedding",
        "num_labels": 0,
        "labels": [],
        "version": None,
        "version_number": None,
        "phase": "Registered",
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 1000])
def test_pages_together_are_everything_once(local: LocalApp, bases: list[str], limit: int) -> None:
    walked: list[str] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        page = ask(local, "GET", "/v1/models", params=query)
        assert len(page["data"]) <= limit
        walked += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert walked == [*bases, *NAMES]


def test_one_name_is_told_as_in_the_list(local: LocalApp) -> None:
    listed = ask(local, "GET", "/v1/models")["data"]
    for entry in listed:
        assert ask(local, "GET", f"/v1/models/{entry['id']}") == entry
    base = listed[0]
    assert ask(local, "GET", f"/v1/models/{base['metadata']['version']}") == base, "by its fingerprint"


def test_one_version_is_a_model_too(local: LocalApp) -> None:
    one, two = ask(local, "GET", "/v1/adapters/split/versions")["data"]
    for address in ("split@v2", f"split@{two['version']}", f"split@{two['version'][:19]}"):
        entry = ask(local, "GET", f"/v1/models/{address}")
        assert entry["id"] == address and entry["metadata"]["version"] == two["version"]
        assert (entry["metadata"]["version_number"], entry["metadata"]["num_labels"]) == (2, 3)
    assert ask(local, "GET", "/v1/models/split@v1")["metadata"]["version"] == one["version"]


def test_what_goes_between_two_looks_is_not_there(local: LocalApp, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = local.router.adapters.catalog
    (version, _) = ask(local, "GET", "/v1/adapters/split/versions")["data"]
    monkeypatch.setattr(catalog, "meant", lambda _: {})
    monkeypatch.setattr(catalog, "numbers", lambda _: {})
    for gone in ("best", f"split@{version['version']}"):
        assert "no adapter is named" in refused(local, "GET", f"/v1/models/{gone}", None, 404)


def test_what_is_no_model(local: LocalApp) -> None:
    assert "did you mean 'split'" in refused(local, "GET", "/v1/models/splitt", None, 404)
    assert "no version v9" in refused(local, "GET", "/v1/models/split@v9", None, 404)
    refused(local, "GET", "/v1/models/a@nonsense", None, 404)
    refused(local, "POST", "/v1/models", {}, 405)


class Cost:
    """Statements of the catalog's database, and how many steps SQLite took for them."""

    def __init__(self) -> None:
        self.statements = 0
        self.steps = 0


@contextmanager
def counted(local: LocalApp) -> Iterator[Cost]:
    cost = Cost()
    engine = local.router.adapters.catalog._database.engine
    unit = 10

    def step() -> int:
        cost.steps += unit
        return 0

    def checkout(connection: Any, *_: object) -> None:
        connection.set_progress_handler(step, unit)

    def executed(*_: object) -> None:
        cost.statements += 1

    event.listen(engine, "checkout", checkout)
    event.listen(engine, "before_cursor_execute", executed)
    try:
        yield cost
    finally:
        event.remove(engine, "checkout", checkout)
        event.remove(engine, "before_cursor_execute", executed)


def test_a_page_costs_the_same_among_many(tiny_bert: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements and SQLite's own steps, with 30 adapters registered and with 1,500."""
    monkeypatch.setattr("deployments.adapters._FOLLOW_S", 3600)  # nobody else's statements are to be counted
    monkeypatch.setattr("adapter_router.catalog.registrar._LOOK_S", 3600)
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/models", {"limit": 10}),
        ("GET", "/v1/models", {"limit": 10, "after": "crowd-0009"}),
        ("GET", "/v1/models/crowd-0011", {}),
        ("GET", "/v1/adapters", {"limit": 10, "after": "crowd-0009"}),
        ("GET", "/v1/adapters", {"limit": 10, "phase": "Ready"}),
        ("GET", "/v1/adapters/crowd-0011", {}),
        ("GET", "/v1/adapters", {"limit": 10, "view": "residency"}),
        ("GET", "/v1/aliases", {"limit": 10}),
        ("GET", "/v1/events", {"limit": 10}),
        ("GET", "/v1/adapters/crowd-0011/events", {"limit": 10}),
        ("GET", "/v1/capacity", {}),
        ("GET", "/readyz", {}),
    ]

    with local_app(tmp_path, tiny_bert.directory) as app:
        catalog = app.router.adapters.catalog
        fingerprint = ask(app, "GET", "/v1/models")["data"][0]["metadata"]["version"]

        def crowd(first: int, last: int) -> None:
            for number in range(first, last):
                name = f"crowd-{number:04}"
                version = AdapterVersion(
                    name, f"sha256:{number:064x}", None, "embedding", (), "none", num_bytes=100, base=fingerprint
                )
                catalog.register_version(AdapterSpec(name, Source("/x")), version)

        def costs() -> dict[str, tuple[int, int]]:
            found = {}
            for method, path, query in requests:
                ask(app, method, path, params=query)  # what is asked for the first time is looked up
                with counted(app) as cost:
                    ask(app, method, path, params=query)
                found[f"{path} {query}"] = (cost.statements, cost.steps)
            return found

        crowd(0, 30)
        few = costs()
        crowd(30, MANY)
        assert ask(app, "GET", "/v1/capacity")["registered"] == MANY
        many = costs()
    for request, (statements, steps) in few.items():
        assert many[request][0] == statements > 0 < steps, request
        assert many[request][1] <= 1.25 * steps + 200, (request, steps, many[request])
