"""Servers on loopback, and fetchers that are allowed to ask them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_router.catalog.sources.fetcher import Fetcher
from adapter_router.catalog.store import ContentStore
from adapter_router.config import SourceConfig
from tests.sources.web_server import WebServer, make_certificate

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_proxies_nor_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the machine has for its own work is none of the tests'."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "AZURE_", "GOOGLE_", "HF_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def web(certificates: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """An https server whose authority we trust."""
    authority, ours = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    server = WebServer(ours)
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store", max_bytes=8 << 20)


@pytest.fixture
def fetcher(web: WebServer, store: ContentStore) -> Fetcher:
    return Fetcher(quick(f"{web.url}/"), store)


def quick(*allowed: str, **changes: object) -> SourceConfig:
    """Patience for tests."""
    settings: dict[str, object] = {"timeout_s": 100, "idle_timeout_s": 5, "attempts": 3, "backoff_s": 0.01, **changes}
    return SourceConfig(allowed=allowed, **settings)  # type: ignore[arg-type]


def put(web: WebServer, folder: str, weights: bytes = b"weights", **others: bytes) -> str:
    """An adapter at ``folder`` of the server; returns its address."""
    web.site.files |= {f"{folder}/{CONFIG}": b"{}", f"{folder}/{WEIGHTS}": weights, **others}
    return web.url + folder


def copies(store: ContentStore) -> list[Path]:
    return sorted(path for path in store.root.iterdir() if path != store.work)


def unfinished(store: ContentStore) -> list[Path]:
    return sorted((store.work / "downloads").glob("*"))
