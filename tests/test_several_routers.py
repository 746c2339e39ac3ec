"""Two routers on one PostgreSQL catalog: what one is told, the other does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from adapter_router.types import Row, RowResult
from deployments.local import deploy, local_ray
from tests.postgres import PostgreSQL
from tests.real_adapters import random_adapter
from tests.serving import Application, demo_args, free_port, serve_pids

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def routers(postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    args = demo_args(
        tmp_path_factory.mktemp("two-routers"), catalog=postgres.new_database(), routers=2, replicas=1, adapters=[]
    )
    port = free_port()
    with local_ray(port):
        yield Application(deploy(args), port)


def both(routers: Application, row: Row) -> list[Any]:
    """What each router answers."""
    outcomes: list[Any] = routers.handle.broadcast("infer", row).results(timeout_s=60)
    assert len(outcomes) == 2
    return outcomes


def _within_a_second(routers: Application, row: Row, wanted: str) -> None:
    start = monotonic()
    while True:
        outcomes = both(routers, row)
        if all(isinstance(o, RowResult) and o.version == wanted for o in outcomes):
            return
        assert monotonic() - start < 1.0, outcomes


def test_what_one_router_is_told_the_other_does_within_a_second(routers: Application, tmp_path: Path) -> None:
    assert len(serve_pids("router")) == 2
    source = tmp_path / "a"
    assert all(outcome.code == "model_not_found" for outcome in both(routers, Row("x", "mine")))
    versions = []
    for seed in (1, 2):
        random_adapter(source, seed)
        report = routers.handle.load_adapter.remote("mine", str(source), replace=True).result(timeout_s=60)
        versions.append(report.version.digest)
        _within_a_second(routers, Row("x", "mine"), versions[-1])
    assert len(set(versions)) == 2
    for turn in range(6):
        response = routers.http.put("/v1/aliases/mine", json={f"v{turn % 2 + 1}": 1})
        assert response.is_success, response.text
        _within_a_second(routers, Row("x", "mine"), versions[turn % 2])
    assert routers.http.delete("/v1/adapters/mine").is_success
    start = monotonic()
    while not all(getattr(outcome, "code", "") == "model_not_found" for outcome in both(routers, Row("x", "mine"))):
        assert monotonic() - start < 1.0
