"""``/v1/aliases`` over HTTP: shares, flips in one step, conflicts, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local_app import LocalApp, local_app
from tests.test_admin_api import ask, name, refused, register, version_of
from tests.tiny import TinyBase

__all__ = ["name"]


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory) as app:
        yield app


@pytest.fixture
def digests(local: LocalApp, tiny_bert: TinyBase, name: str, tmp_path: Path) -> tuple[str, str]:
    """An adapter ``name`` with two versions, of which it means the first."""
    directory = tiny_bert.adapter(tmp_path / "adapter", 2, 1)
    register(local, name, directory)
    tiny_bert.adapter(directory, 2, 2)
    newer = ask(local, "POST", f"/v1/adapters/{name}/versions", {"activate": False}, 201)
    return version_of(local, name), newer["version"]


def put(local: LocalApp, name: str, weights: Any, **headers: str) -> Any:
    return ask(local, "PUT", f"/v1/aliases/{name}", weights, headers=headers)


def test_shares_are_kept_and_each_user_keeps_a_version(local: LocalApp, name: str, digests: tuple[str, str]) -> None:
    assert put(local, name, {"v1": 90, "v2": 10})["targets"] == [
        {"adapter": name, "number": 1, "weight": 90},
        {"adapter": name, "number": 2, "weight": 10},
    ]
    listed = ask(local, "GET", f"/v1/adapters/{name}/versions")["data"]
    assert [entry["share"] for entry in listed] == [0.9, 0.1]
    put(local, name, {"v1": 1, "v2": 1})
    users = [str(number) for number in range(24)]

    def answering(user: str) -> str:
        body = {"model": name, "input": [[1, 2]], "user": user}
        version: str = ask(local, "POST", "/v1/classify", body)["adapter"]["version"]
        return version

    first = [answering(user) for user in users]
    assert set(first) == set(digests) and [answering(user) for user in users] == first


def test_an_alias_of_its_own_may_mean_anybodys_version(local: LocalApp, name: str, digests: tuple[str, str]) -> None:
    alias = f"{name}-best"
    made = put(local, alias, {f"{name}@v2": 1})
    assert made["name"] == alias and version_of(local, alias) == digests[1]
    assert made == ask(local, "GET", f"/v1/aliases/{alias}")
    put(local, alias, {f"{name}@{digests[0][:19]}": 1})
    assert version_of(local, alias) == digests[0] == version_of(local, name)
    names = [entry["name"] for entry in ask(local, "GET", "/v1/aliases", params={"after": name, "limit": 1})["data"]]
    assert names == [alias]
    assert ask(local, "DELETE", f"/v1/aliases/{alias}") == {"name": alias, "removed": True}
    refused(local, "POST", "/v1/classify", {"model": alias, "input": [[1]]}, 404)


def test_only_who_has_seen_the_last_change_may_change_it(local: LocalApp, name: str, digests: tuple[str, str]) -> None:
    response = local.http.get(f"/v1/aliases/{name}")
    seen = response.headers["etag"]
    assert seen == f'"{response.json()["revision"]}"'
    flipped = put(local, name, {"v2": 1}, **{"If-Match": seen})
    assert version_of(local, name) == digests[1]
    error = ask(local, "PUT", f"/v1/aliases/{name}", {"v1": 1}, 409, headers={"If-Match": seen})["error"]
    assert error["code"] == "conflict" and str(flipped["revision"]) in error["message"]
    assert version_of(local, name) == digests[1]
    put(local, name, {"v1": 1}, **{"If-Match": str(flipped["revision"])})
    assert version_of(local, name) == digests[0]
    for nonsense in ("*", "latest", '"', '"1", "2"', "-1", "9" * 30, "1²".encode("latin-1")):
        refused(local, "PUT", f"/v1/aliases/{name}", {"v2": 1}, 400, headers={"If-Match": nonsense})
    assert version_of(local, name) == digests[0]
    fresh = f"{name}-fresh"
    put(local, fresh, {f"{name}@v1": 1}, **{"If-Match": "0"})  # only if there is none
    refused(local, "PUT", f"/v1/aliases/{fresh}", {f"{name}@v2": 1}, 409, headers={"If-Match": "0"})


def test_every_change_can_be_taken_back(local: LocalApp, name: str, digests: tuple[str, str]) -> None:
    put(local, name, {"v2": 1})
    put(local, name, {"v1": 1, "v2": 1})
    back = local.http.post(f"/v1/aliases/{name}/rollback")
    assert back.headers["etag"] == f'"{back.json()["revision"]}"'
    assert back.json()["targets"] == [{"adapter": name, "number": 2, "weight": 1}]
    assert version_of(local, name) == digests[1]
    ask(local, "POST", f"/v1/aliases/{name}/rollback")
    assert version_of(local, name) == digests[0]
    assert "nothing else before" in refused(local, "POST", f"/v1/aliases/{name}/rollback", None, 400)


@pytest.mark.usefixtures("digests")
def test_what_no_name_can_mean(local: LocalApp, name: str) -> None:
    before = ask(local, "GET", f"/v1/aliases/{name}")
    for weights, fragments in (
        ({"v1": -1, "v7": 1, "nobody@v1": 1, "best": 1}, ["v1", "-1", "v7", "nobody", "best"]),
        ({"v1": 0}, ["all weights are 0"]),
        ({"v1": 1.5}, ["v1"]),
        ({"v1": "1"}, ["v1"]),
        ({"v1": True}, ["v1"]),
        ({"v1": 10**30}, ["v1"]),
        ({"v1": 1, f"{name}@v1": 1}, ["twice"]),
        ({}, ["at least 1"]),
        ([1], ["dict"]),
        (None, ["required"]),
    ):
        text = refused(local, "PUT", f"/v1/aliases/{name}", weights, 400)
        assert all(fragment in text for fragment in fragments), text
    assert ask(local, "GET", f"/v1/aliases/{name}") == before
    assert "its own" not in refused(local, "GET", f"/v1/aliases/{name}x", None, 404)
    assert "own name" in refused(local, "DELETE", f"/v1/aliases/{name}", None, 400)
    for method, path in (("DELETE", ""), ("POST", "/rollback")):
        assert "did you mean" in refused(local, method, f"/v1/aliases/{name}x{path}", None, 404)
    base = ask(local, "GET", "/v1/models")["data"][0]["id"]
    assert "base model's" in refused(local, "PUT", f"/v1/aliases/{base}", {f"{name}@v1": 1}, 400)
    for impossible, status in (("a@v1", 400), ("%20a", 400), ("x%2Fwarm", 405)):
        refused(local, "PUT", f"/v1/aliases/{impossible}", {f"{name}@v1": 1}, status)


@pytest.mark.usefixtures("digests")
def test_a_name_is_an_adapters_or_an_alias(local: LocalApp, name: str) -> None:
    alias = f"{name}-alias"
    put(local, alias, {f"{name}@v1": 1})
    assert "is an alias" in refused(local, "POST", "/v1/adapters", {"name": alias, "uri": "/x"}, 400)
