"""Processes are killed, from one replica to the whole cluster: what was registered means what it meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.demo.tenants import ADAPTERS, BASE
from tests.real_adapters import random_adapter
from tests.serving import free_port, wait_for

pytestmark = pytest.mark.serve

_START_S = 180.0


class Server:
    """``adapter-router serve`` in processes of its own."""

    def __init__(self, config: Path, port: int) -> None:
        command = [str(Path(sys.executable).parent / "adapter-router"), "serve", str(config), "--port", str(port)]
        self._log = config.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, start_new_session=True)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def wait_until_ready(self) -> None:
        wait_for(self.is_ready, _START_S)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server ended by itself"
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def pids(self, deployment: str) -> list[int]:
        """Living processes of one deployment, by the title Ray gives them."""
        title = f"ServeReplica:adapter-router:{deployment}"
        return [p.pid for p in self._family() if title in " ".join(_command_line(p))]

    def kill(self) -> None:
        """SIGKILL for the server and everything it started: Ray's daemons, the controller, routers and replicas."""
        if self.process.returncode is not None:
            return  # it has been killed before
        family = [psutil.Process(self.process.pid), *self._family()]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)
        self.process.wait(30)
        self._log.close()

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def serving(config: Path, port: int) -> Iterator[Server]:
    server = Server(config, port)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One replica; ``language`` is preloaded."""
    args = {
        "base": BASE,
        "device": "cpu",
        "num_threads": 1,
        "num_cpus": 0.1,
        "store_dir": str(tmp_path / "store"),
        "adapters": [{"name": "language", "path": ADAPTERS["language"], "preload": True}],
    }
    application = {"name": "adapter-router", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def _ask(http: httpx.Client, model: str) -> Any:
    response = http.post("/v1/classify", json={"model": model, "input": "Guten Morgen zusammen"})
    assert response.is_success, response.text
    body = response.json()
    return body["adapter"]["version"], body["data"][0]["probs"]


def _resident(http: httpx.Client) -> dict[str, set[str]]:
    """Names of adapters held, by replica."""
    held: dict[str, set[str]] = {}
    for row in http.get("/v1/adapters", params={"view": "residency"}).json()["data"]:
        held.setdefault(row["replica"], set()).update(row["adapters"])
    return held


def _catalog(http: httpx.Client) -> Any:
    """All that a restart must not change."""
    registrations = http.get("/v1/adapters").json()["data"]
    versions = {r["name"]: http.get(f"/v1/adapters/{r['name']}/versions").json()["data"] for r in registrations}
    aliases = http.get("/v1/aliases").json()["data"]
    return [(r["name"], r["phase"]) for r in registrations], versions, [(a["name"], a["targets"]) for a in aliases]


def test_kill_9_of_router_replica_and_cluster_loses_nothing(config: Path, tmp_path: Path) -> None:
    port = free_port()
    source = tmp_path / "source"
    late = [f"late-{number}" for number in range(8)]
    for number, name in enumerate(late):
        random_adapter(tmp_path / name, number)
    with serving(config, port) as server:
        http = server.http
        random_adapter(source, 1)
        assert http.post("/v1/adapters", json={"name": "mine", "uri": str(source), "wait": True}).is_success
        random_adapter(source, 2)
        assert http.post("/v1/adapters/mine/versions", json={}).is_success
        assert http.put("/v1/aliases/mine", json={"v1": 1}).is_success
        assert http.put("/v1/aliases/best", json={"mine@v2": 1}).is_success
        assert http.put("/v1/adapters/mine/pin").is_success
        known = _catalog(http)
        names = ("language", "mine", "best", "mine@v2")
        answers = {name: _ask(http, name) for name in names}
        assert answers["mine"] != answers["best"] == answers["mine@v2"]

        def unharmed() -> None:
            assert _catalog(http) == known
            for name in names:
                version, probs = _ask(http, name)
                assert version == answers[name][0] and probs == pytest.approx(answers[name][1], abs=1e-5)

        (router,) = server.pids("router")
        os.kill(router, signal.SIGKILL)
        wait_for(lambda: server.pids("router") not in ([], [router]) and server.is_ready(), _START_S)
        unharmed()

        (replica,) = server.pids("replica")
        (before,) = _resident(http)
        os.kill(replica, signal.SIGKILL)
        wait_for(lambda: server.pids("replica") not in ([], [replica]), _START_S)
        wait_for(lambda: set(_resident(http)) - {before} != set(), _START_S)
        # Nobody has asked for anything since: what the new replica holds, it held before it was ready.
        ((_, held),) = _resident(http).items()
        assert {"language", "mine"} <= held
        unharmed()

        # Registered, answered 202, killed at once: the next start takes them up.
        for name in late:
            response = http.post("/v1/adapters", json={"name": name, "uri": str(tmp_path / name)})
            assert response.status_code == 202, response.text
        server.kill()
    with serving(config, port) as again:
        http = again.http
        ((_, held),) = _resident(http).items()
        assert {"language", "mine"} <= held, "preloaded and pinned ones are there before the first row"
        wait_for(lambda: {http.get(f"/v1/adapters/{name}").json()["phase"] for name in late} == {"Ready"})
        assert all(_ask(http, name) for name in late)
        for name in late:
            assert http.delete(f"/v1/adapters/{name}").is_success
        unharmed()
