"""The whole application in one process: real router, replicas, catalog and HTTP server; only Ray Serve is not there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from ray import serve

from adapter_router.catalog.records import AdapterSpec
from adapter_router.config import CatalogConfig, EngineConfig, RoutingConfig
from adapter_router.routing.replica_state import Member
from deployments import replica_view
from deployments.api import build_http
from deployments.replica import Replica
from deployments.router import Router, current_router
from tests.serving import wait_for

APP = "local"


@dataclass(frozen=True)
class LocalMethod:
    """A replica's method behind Serve's calling convention."""

    replicas: Mapping[str, Replica]
    name: str
    replica: str | None = None

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        chosen = self.replicas[self.replica] if self.replica else next(iter(self.replicas.values()))
        return asyncio.get_running_loop().create_task(getattr(chosen, self.name)(*args))


class LocalHandle:
    """What a router uses of a Serve handle, for replicas in this process."""

    app_name = APP

    def __init__(self, deployment_name: str, replicas: Mapping[str, Replica]) -> None:
        self.deployment_name = deployment_name
        self.replicas = replicas
        self.info = LocalMethod(replicas, "info")
        replica_view.publish(APP, deployment_name, tuple(Member(name, name) for name in replicas))

    def options(self, *, method_name: str, session_id: str, **_: Any) -> LocalMethod:
        return LocalMethod(self.replicas, method_name, session_id)


class LocalApp:
    """A running application: its router, its replicas by name, and a client of its HTTP server."""

    def __init__(self, bases: Sequence[EngineConfig], catalog: CatalogConfig, declared: Sequence[AdapterSpec]) -> None:
        self._bases = bases
        self._catalog = catalog
        self._declared = declared
        self.router: Router = Router.__new__(Router)
        self.replicas: dict[str, Replica] = {}
        http = build_http()
        http.router.lifespan_context = self._lifespan
        http.dependency_overrides[current_router] = lambda: self.router
        self.server = uvicorn.Server(uvicorn.Config(http, port=0, log_level="warning"))
        self.url = ""
        self.http = httpx.Client(timeout=60)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run something on the application's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def start_replica(self, name: str) -> None:
        """Another replica of the first base, which no router knows of yet."""
        with _in_serve(name):
            self.replicas[name] = Replica(self._bases[0], self._catalog)

    def publish_replica(self, name: str) -> None:
        """Let the router know of a replica of the first base."""
        handle: Any = self.router.bases.first._replicas
        handle.replicas[name] = self.replicas[name]
        replica_view.publish(APP, handle.deployment_name, tuple(Member(each, each) for each in handle.replicas))

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        handles = []
        for number, base in enumerate(self._bases):
            name = f"replica-{number}"
            with _in_serve(name):
                self.replicas[name] = await asyncio.to_thread(Replica, base, self._catalog)
            handles.append(LocalHandle(f"base-{number} of {id(self)}", {name: self.replicas[name]}))
        with _in_serve("router"):
            await self.router.__init__(handles, RoutingConfig(), self._catalog, self._declared)  # type: ignore[misc]
        try:
            yield
        finally:
            await self.router.adapters.close()
            for replica in self.replicas.values():
                replica._engine.close()


@contextmanager
def local_app(
    root: Path,
    *bases: Path,
    declared: Sequence[AdapterSpec] = (),
    catalog: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Iterator[LocalApp]:
    """One replica of each base, on a catalog and a store below ``root``; until the end of the block.

    ``catalog`` and ``engine``: fields of ``CatalogConfig`` and ``EngineConfig``.
    """
    catalog_config = CatalogConfig(store_dir=root / "store", **(catalog or {}))
    configs = [EngineConfig(base=str(base), device="cpu", store_dir=root / "store", **engine) for base in bases]
    app = LocalApp(configs, catalog_config, declared)
    thread = threading.Thread(target=app.server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: app.server.started or not thread.is_alive())
        assert app.server.started, "the application did not start"
        port = app.server.servers[0].sockets[0].getsockname()[1]
        app.url = f"http://127.0.0.1:{port}"
        app.http.base_url = httpx.URL(app.url)
        yield app
    finally:
        app.http.close()
        app.server.should_exit = True
        thread.join(30)


@contextmanager
def _in_serve(replica: str) -> Iterator[None]:
    """What a deployment asks Serve about itself."""
    context = SimpleNamespace(app_name=APP, replica_id=SimpleNamespace(unique_id=replica))
    before = serve.get_replica_context
    serve.get_replica_context = lambda: context
    try:
        yield
    finally:
        serve.get_replica_context = before
