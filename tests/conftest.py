"""Environment of every test: offline, one thread a process, Ray without authentication or telemetry."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_SERVE_LOG_TO_STDERR="0",
)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from deployments.demo.tenants import ADAPTERS, BASE, BASE_SHA256
from deployments.local import deploy, local_ray
from tests.serving import Application, demo_args, free_port
from tests.tiny import TinyBase

pytest_plugins = ["tests.postgres"]

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return TinyBase("bert", tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def engine(tiny_bert: TinyBase, tmp_path: Path) -> Iterator[Engine]:
    with Engine(EngineConfig(base=str(tiny_bert.directory), device="cpu", store_dir=tmp_path / "store")) as engine:
        yield engine


@pytest.fixture(scope="session")
def real_engine() -> Iterator[Engine]:
    """The real MiniLM base with the four shipped adapters."""
    with Engine(EngineConfig(base=BASE, base_sha256=BASE_SHA256, device="cpu")) as engine:
        for name, directory in ADAPTERS.items():
            engine.load_adapter(name, directory)
        yield engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray of their own come before the one that lives to the end: never too many replicas at once."""
    items.sort(key=lambda item: "app" in getattr(item, "fixturenames", ()))
    for item in items:
        if "app" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.serve)


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """The demo's application: two replicas, four tenants, HTTP."""
    port = free_port()
    with local_ray(port):
        yield Application(deploy(demo_args(tmp_path_factory.mktemp("store"))), port)
