"""What replicas hold over HTTP: warm, pin, preload, the residency view and the capacity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.test_admin_api import ask, directory, name, refused, register, version_of
from tests.tiny import TinyBase

__all__ = ["directory", "name"]


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return TinyBase("distilbert", tmp_path_factory.mktemp("tiny-distilbert"))


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, distilbert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory, distilbert.directory) as app:
        yield app


def held(local: LocalApp, name: str) -> list[Any]:
    entries = ask(local, "GET", "/v1/adapters", params={"view": "residency", "limit": 1000})["data"]
    return [entry for entry in entries if name in entry["adapters"]]


def test_warmed_it_is_on_the_device(local: LocalApp, name: str, directory: Path) -> None:
    registered = register(local, name, directory)
    version = registered["targets"][0]["version"]
    warmed = ask(local, "POST", f"/v1/adapters/{name}/warm")
    assert warmed == {"object": "list", "name": name, "data": [{"replica": "replica-0", "version": version}]}
    (entry,) = held(local, name)
    assert (entry["replica"], entry["tier"], entry["version"]) == ("replica-0", "device", version)
    assert (entry["adapters"], entry["versions"]) == ([name], [f"{name}@v1"])
    listed = ask(local, "GET", f"/v1/adapters/{name}/versions/1")
    assert 0 < entry["num_bytes"] <= listed["num_bytes"] and entry["base"] == listed["base"]
    assert not entry["pinned"] and entry["leases"] == 0
    assert 0 <= entry["idle_s"] < 60 and abs(time.time() - entry["idle_s"] - entry["last_used"]) < 5


def test_all_versions_of_a_split_name_are_warmed(
    local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase
) -> None:
    register(local, name, directory)
    tiny_bert.adapter(directory, 2, 990)
    ask(local, "POST", f"/v1/adapters/{name}/versions", status=201)
    ask(local, "PUT", f"/v1/aliases/{name}", {"v1": 1, "v2": 1})
    assert len(ask(local, "POST", f"/v1/adapters/{name}/warm")["data"]) == 2
    assert {version for entry in held(local, name) for version in entry["versions"]} == {f"{name}@v1", f"{name}@v2"}


def test_pinned_and_let_go(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory)
    assert ask(local, "PUT", f"/v1/adapters/{name}/pin")["pinned"]
    (entry,) = held(local, name)
    assert entry["pinned"] and entry["tier"] == "device"
    assert not ask(local, "DELETE", f"/v1/adapters/{name}/pin")["pinned"]
    assert [entry["pinned"] for entry in held(local, name)] == [False]


def test_a_pin_follows_what_the_name_means(local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase) -> None:
    register(local, name, directory, pinned=True)
    assert [entry["versions"] for entry in held(local, name) if entry["pinned"]] == [[f"{name}@v1"]]
    tiny_bert.adapter(directory, 2, 98)
    ask(local, "POST", f"/v1/adapters/{name}/versions", status=201)
    assert [entry["versions"] for entry in held(local, name) if entry["pinned"]] == [[f"{name}@v2"]]
    ask(local, "POST", f"/v1/aliases/{name}/rollback")
    assert [entry["versions"] for entry in held(local, name) if entry["pinned"]] == [[f"{name}@v1"]]
    ask(local, "DELETE", f"/v1/adapters/{name}")
    assert held(local, name) == []


def test_content_stays_pinned_for_the_other_name(local: LocalApp, name: str, directory: Path) -> None:
    other = f"{name}-other"
    register(local, name, directory, pinned=True)
    register(local, other, directory, pinned=True)
    ask(local, "DELETE", f"/v1/adapters/{name}/pin")
    assert [(entry["adapters"], entry["pinned"]) for entry in held(local, other)] == [([name, other], True)]
    ask(local, "DELETE", f"/v1/adapters/{other}")
    assert [(entry["adapters"], entry["pinned"]) for entry in held(local, name)] == [([name], False)]


@pytest.mark.parametrize("field", ["pinned", "preload"])
def test_registered_in_the_background_it_gets_there_too(
    local: LocalApp, name: str, directory: Path, field: str
) -> None:
    ask(local, "POST", "/v1/adapters", {"name": name, "uri": str(directory), field: True}, 202)
    wait_for(lambda: [entry["pinned"] for entry in held(local, name)] == [field == "pinned"])


def test_replaced_without_the_pin(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory, pinned=True)
    register(local, name, directory, replace=True)
    assert [entry["pinned"] for entry in held(local, name)] == [False]


def test_the_residency_view_comes_in_pages(local: LocalApp, name: str, directory: Path) -> None:
    for number in range(3):
        register(local, f"{name}-{number}", directory, task="text-classification", labels=["x", "y", f"z{number}"])
        ask(local, "POST", f"/v1/adapters/{name}-{number}/warm")
    everything = ask(local, "GET", "/v1/adapters", params={"view": "residency", "limit": 1000})["data"]
    walked, after = [], None
    while True:
        query = {"view": "residency", "limit": 1, **({"after": after} if after else {})}
        page = ask(local, "GET", "/v1/adapters", params=query)
        walked += [entry["id"] for entry in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert walked == [entry["id"] for entry in everything] and len(walked) == len(set(walked)) > 0
    (entry,) = held(local, f"{name}-0")
    assert len(entry["adapters"]) == 3, "one copy for all who have the same content"
    for query, fragment in (({"view": "tiers"}, "view"), ({"view": "residency", "phase": "Ready"}, "phase")):
        assert fragment in refused(local, "GET", "/v1/adapters", None, 400, params=query)


def test_a_retired_version_is_nobodys(local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase) -> None:
    for each in (name, f"{name}-other"):
        register(local, each, directory)
    ask(local, "POST", f"/v1/adapters/{name}/warm")
    assert len(held(local, name)[0]["versions"]) == 2
    tiny_bert.adapter(directory, 2, 97)
    ask(local, "POST", f"/v1/adapters/{name}/versions", status=201)
    ask(local, "DELETE", f"/v1/adapters/{name}/versions/1")
    assert [entry["versions"] for entry in held(local, f"{name}-other")] == [[f"{name}-other@v1"]]


def test_a_mix_is_shown_without_a_name(local: LocalApp, name: str, directory: Path) -> None:
    register(local, name, directory)
    answer = ask(local, "POST", "/v1/classify", {"model": {name: 0.5}, "input": [[1, 2]]})
    entries = ask(local, "GET", "/v1/adapters", params={"view": "residency", "limit": 1000})["data"]
    (mix,) = (entry for entry in entries if entry["version"] == answer["adapter"]["version"])
    assert mix["adapters"] == mix["versions"] == []


def test_capacity_counts_what_is_registered_and_what_fits(
    tiny_bert: TinyBase, distilbert: TinyBase, tmp_path: Path
) -> None:
    """Room for two and a half adapters of the mean size on each device."""
    with local_app(tmp_path, tiny_bert.directory, distilbert.directory, adapter_memory_bytes=22_000) as app:
        empty = ask(app, "GET", "/v1/capacity")
        assert empty["registered"] == 0 and [base["fits"] for base in empty["data"]] == [0, 0]
        for number in range(4):
            register(app, f"bert-{number}", tiny_bert.adapter(tmp_path / f"{number}", 2, number))
        register(app, "distil", distilbert.adapter(tmp_path / "distil", 2, 1))
        sizes = [ask(app, "GET", f"/v1/adapters/bert-{n}/versions/1")["num_bytes"] for n in range(4)]
        whole = ask(app, "GET", "/v1/capacity")
        bert, distil = whole["data"]
        assert whole["registered"] == 5 and (bert["adapters"], bert["versions"]) == (4, 4)
        assert bert["num_bytes"] == sum(sizes) and bert["mean_num_bytes"] == sum(sizes) / 4
        fits = int(22_000 // bert["mean_num_bytes"])
        assert bert["fits"] == bert["fits_everywhere"] == bert["replicas"][0]["fits"] == fits == 2
        assert bert["summary"] == "fits 2 of your 4 registered adapters"
        assert (distil["adapters"], distil["fits"]) == (1, 1)
        assert bert["replicas"][0]["device_bytes"] == 22_000 >= bert["replicas"][0]["device_used"]
        ask(app, "PUT", "/v1/adapters/bert-0/pin")
        (replica,) = ask(app, "GET", "/v1/capacity")["data"][0]["replicas"]
        assert 0 < replica["pinned_bytes"] <= replica["device_used"]
        tiny_bert.adapter(tmp_path / "1", 2, 77)
        ask(app, "POST", "/v1/adapters/bert-1/versions", status=201)
        assert ask(app, "GET", "/v1/capacity")["data"][0]["versions"] == 5
        ask(app, "DELETE", "/v1/adapters/bert-1/versions/1")
        ask(app, "DELETE", "/v1/adapters/bert-3")
        after = ask(app, "GET", "/v1/capacity")["data"][0]
        assert (after["adapters"], after["versions"], after["num_bytes"]) == (3, 3, sum(sizes[:3]))


def test_what_does_not_fit_is_not_pinned(
    local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase, tmp_path: Path
) -> None:
    """Others need room, too: a fifth of the memory is never pinned."""
    register(local, name, directory)
    ask(local, "POST", f"/v1/adapters/{name}/warm")
    num_bytes = held(local, name)[0]["num_bytes"]
    with local_app(tmp_path, tiny_bert.directory, adapter_memory_bytes=int(1.2 * num_bytes)) as app:
        register(app, "small", directory)
        assert "pinned adapters hold" in refused(app, "PUT", "/v1/adapters/small/pin", None, 400)
        assert not ask(app, "GET", "/v1/adapters/small")["pinned"]
        assert version_of(app, "small") and [entry["pinned"] for entry in held(app, "small")] == [False]
