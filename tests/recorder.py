"""What routes ask of a router, kept: for tests of HTTP over a real engine with all tenants of the demo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from adapter_router.catalog.location import resolve
from adapter_router.config import EngineConfig
from adapter_router.engine import Engine
from adapter_router.errors import AdapterRouterError
from adapter_router.types import Row, RowOutcome
from deployments.demo.tenants import BASE, TEXT_TENANTS
from tests.test_routes import EngineRouter


class Recorder(EngineRouter):
    """Keeps the rows of each call, and whether they were asked together; answers with ``error`` where there is one."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.names = engine._catalog
        self.calls: list[tuple[list[Row], bool]] = []
        self.error: AdapterRouterError | None = None

    @property
    def rows(self) -> list[Row]:
        return [row for rows, _ in self.calls for row in rows]

    async def infer_many(self, rows: Sequence[Row], together: bool = False) -> list[RowOutcome]:
        self.calls.append((list(rows), together))
        return [self.error] * len(rows) if self.error else await super().infer_many(rows, together)


@contextmanager
def tenants_engine() -> Iterator[Engine]:
    """The real base with every adapter on texts that ships with the project."""
    with Engine(EngineConfig(base=BASE, device="cpu")) as engine:
        for tenant in TEXT_TENANTS:
            engine.load_adapter(tenant.name, resolve(tenant.path))
        yield engine


def sample(engine: Engine, name: str, **labels: str) -> float:
    """One of the engine's metrics."""
    return engine.metrics.registry.get_sample_value(f"adapter_router_{name}", labels) or 0.0


def encodings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that the engine's tokenizer has seen since."""
    seen: list[Row] = []
    encode = engine.base.encoder.encode

    def kept(row: Row, prefix: str = "") -> Any:
        seen.append(row)
        return encode(row, prefix)

    monkeypatch.setattr(engine.base.encoder, "encode", kept)
    return seen
