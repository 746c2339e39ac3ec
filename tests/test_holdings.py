"""Pins and preloads against everything that happens at once: each replica ends with what the catalog says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapter_router.types import AdapterVersion
from tests.local_app import LocalApp, local_app
from tests.serving import wait_for
from tests.test_admin_api import ask, directory, name, register, version_of
from tests.test_residency_api import held
from tests.tiny import TinyBase

__all__ = ["directory", "name"]


@pytest.fixture(scope="module")
def local(tiny_bert: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApp]:
    with local_app(tmp_path_factory.mktemp("local"), tiny_bert.directory) as app:
        yield app


def pins(local: LocalApp, name: str) -> list[bool]:
    return [entry["pinned"] for entry in held(local, name)]


def test_pinned_while_it_is_being_checked(
    local: LocalApp, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = local.router.adapters.registrar
    check, gate = registrar._check, threading.Event()

    async def late(*args: Any) -> Any:
        await asyncio.to_thread(gate.wait, 60)
        return await check(*args)

    monkeypatch.setattr(registrar, "_check", late)
    ask(local, "POST", "/v1/adapters", {"name": name, "uri": str(directory)}, 202)
    wait_for(lambda: ask(local, "GET", f"/v1/adapters/{name}")["phase"] == "Validating")
    assert ask(local, "PUT", f"/v1/adapters/{name}/pin")["pinned"]
    gate.set()
    wait_for(lambda: pins(local, name) == [True], 10)


def test_let_go_while_it_is_being_pinned(
    local: LocalApp, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(local, name, directory)
    replica = local.replicas["replica-0"]
    pin, reached, gate = replica.pin, threading.Event(), threading.Event()

    async def late(version: AdapterVersion) -> Any:
        reached.set()
        await asyncio.to_thread(gate.wait, 60)
        return await pin(version)

    monkeypatch.setattr(replica, "pin", late)
    with ThreadPoolExecutor(1) as caller:
        pinned = caller.submit(ask, local, "PUT", f"/v1/adapters/{name}/pin")
        assert reached.wait(10)
        assert not ask(local, "DELETE", f"/v1/adapters/{name}/pin")["pinned"]
        gate.set()
        pinned.result(30)
    assert pins(local, name) == [False]


def test_a_replica_that_has_just_come_is_told_what_it_could_not_read(
    tiny_bert: TinyBase, tmp_path: Path, directory: Path
) -> None:
    other = tiny_bert.adapter(tmp_path / "other", 2, 5)
    with local_app(tmp_path, tiny_bert.directory) as app:
        register(app, "mine", directory)
        register(app, "other", other, pinned=True)
        app.start_replica("late")  # it has read the catalog, and no router knows of it
        ask(app, "PUT", "/v1/adapters/mine/pin")
        ask(app, "DELETE", "/v1/adapters/other/pin")
        app.publish_replica("late")

        def pinned() -> dict[str, bool]:
            entries = ask(app, "GET", "/v1/adapters", params={"view": "residency"})["data"]
            return {entry["adapters"][0]: entry["pinned"] for entry in entries if entry["replica"] == "late"}

        wait_for(lambda: pinned() == {"mine": True, "other": False}, 10)


def test_a_replica_that_does_not_answer_is_told_again(
    local: LocalApp, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(local, name, directory, pinned=True)
    replica, asked = local.replicas["replica-0"], []
    pin = replica.pin

    async def pin_at_the_third_time(version: AdapterVersion) -> Any:
        asked.extend([version] * (version.adapter == name))
        if len(asked) < 3:
            raise OSError("lost on the way")
        return await pin(version)

    monkeypatch.setattr(replica, "pin", pin_at_the_third_time)
    holdings = local.router.adapters.holdings
    local.run(replica.unpin([entry.digest for entry in local.run(replica.residency())]))
    following = asyncio.run_coroutine_threadsafe(holdings.keep_aligned(), local._loop)
    try:
        wait_for(lambda: pins(local, name) == [True], 10)
    finally:
        following.cancel()
    assert len(asked) == 3


def test_a_stuck_replica_stops_neither_flips_nor_metrics(
    local: LocalApp, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.pool._ANSWER_S", 0.1)
    register(local, name, directory)

    async def stuck(*_: object) -> Any:
        await asyncio.Event().wait()

    for method in ("unpin", "metrics_text", "residency", "capacity"):
        monkeypatch.setattr(local.replicas["replica-0"], method, stuck)
    ask(local, "PUT", f"/v1/aliases/{name}", {"v1": 2}, timeout=10)
    assert 'process="router"' in local.http.get("/metrics", timeout=10).text
    assert ask(local, "GET", "/v1/capacity", timeout=10)["data"][0]["replicas"] == []
    assert ask(local, "GET", "/v1/adapters", params={"view": "residency"}, timeout=10)["data"] == []


def test_a_flip_is_done_even_where_its_pin_has_no_room(
    local: LocalApp, name: str, directory: Path, tiny_bert: TinyBase, tmp_path: Path
) -> None:
    large = tiny_bert.adapter(tmp_path / "large", 2, 4, r=16)
    register(local, name, large)
    ask(local, "POST", f"/v1/adapters/{name}/warm")
    room = int(1.1 * held(local, name)[0]["num_bytes"])
    with local_app(tmp_path, tiny_bert.directory, adapter_memory_bytes=room) as app:
        register(app, "mine", directory, pinned=True)
        old = version_of(app, "mine")
        tiny_bert.adapter(directory, 2, 4, r=16)
        new = ask(app, "POST", "/v1/adapters/mine/versions", status=201)
        assert version_of(app, "mine") == new["version"] != old
        assert set(pins(app, "mine")) == {False}, "it takes more than pins may"
        assert ask(app, "POST", "/v1/aliases/mine/rollback")["targets"][0]["number"] == 1
        assert ask(app, "PUT", "/v1/aliases/mine", {"v2": 1})["targets"][0]["number"] == 2
