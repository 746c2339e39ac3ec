"""Callers that leave, on a real Ray: their rows leave the queue, too, and no forward runs for them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve

from adapter_router.config import EngineConfig
from adapter_router.routing.replica_state import Member
from adapter_router.types import Row
from deployments import replica_view
from deployments.app import APP_NAME, RoutingArgs
from deployments.local import deploy, local_ray
from tests.serving import Application, demo_args, free_port, serve_pids, wait_for

pytestmark = pytest.mark.serve

BODY = {"model": "language", "input": "Guten Morgen, wie geht es dir heute?"}
NEVER_S = 3600.0


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """One replica, which no row is sent to until another one keeps it company."""
    routing = RoutingArgs(max_batch_rows=2, batch_wait_s=NEVER_S, max_wait_s=NEVER_S, timeout_s=NEVER_S)
    port = free_port()
    with local_ray(port):
        args = demo_args(tmp_path_factory.mktemp("store"), replicas=1, routing=routing)
        app = Application(deploy(args), port)
        app.infer_many([Row(BODY["input"], BODY["model"])] * 2)  # who waits for an adapter to be loaded waits elsewhere
        yield app


def queued(app: Application, rows: int) -> None:
    wait_for(lambda: app.metric("queued_rows") == rows)


def check_nothing_is_left(app: Application, forwards: float, computed: float) -> None:
    """Two more rows make a batch: with a third one in the queue only one of them would be answered."""
    queued(app, 0)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: app.http.post("/v1/classify", json=BODY), range(2)))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert app.metric("forwards_total") - forwards == 1
    assert app.metric("forward_rows_sum") - computed == 2


@pytest.fixture
def before(lonely: Application) -> tuple[float, float]:
    return lonely.metric("forwards_total"), lonely.metric("forward_rows_sum")


def test_a_client_that_hangs_up_takes_its_row_along(lonely: Application, before: tuple[float, float]) -> None:
    body = json.dumps(BODY).encode()
    head = f"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection((lonely.http.base_url.host, lonely.http.base_url.port or 80)) as client:
        client.sendall(head.encode() + b"\r\n" + body)
        queued(lonely, 1)
    check_nothing_is_left(lonely, *before)


def test_so_does_a_handle_call_that_is_cancelled(lonely: Application, before: tuple[float, float]) -> None:
    call = lonely.handle.infer.remote(Row(BODY["input"], BODY["model"]))
    queued(lonely, 1)
    call.cancel()
    check_nothing_is_left(lonely, *before)


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"x-request-timeout-ms": "500"}, 504), ({"x-request-timeout-seconds": "0.5"}, {408, 504})],
    ids=["ours", "Serve's"],
)
def test_and_a_request_whose_time_is_over(
    lonely: Application, before: tuple[float, float], headers: dict[str, str], status: int | set[int]
) -> None:
    response = lonely.http.post("/v1/classify", json=BODY, headers=headers)
    assert response.status_code in (status if isinstance(status, set) else {status})
    check_nothing_is_left(lonely, *before)


def test_a_replica_that_is_lost_is_followed_by_one_of_the_same_identity(lonely: Application) -> None:
    def members() -> tuple[Member, ...]:
        return replica_view.members(APP_NAME, "replica")

    base = serve.get_deployment_handle("replica", APP_NAME).info.remote().result(timeout_s=60)
    assert base.tasks
    (first,) = members()
    assert (first.home, first.weight) == ("rank-0", EngineConfig.adapter_memory_bytes)
    (pid,) = serve_pids("replica")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: {member.replica for member in members()} not in ({first.replica}, set()))
    (second,) = members()
    assert (second.home, second.weight) == (first.home, first.weight)
    assert lonely.metric("queued_rows") == 0
