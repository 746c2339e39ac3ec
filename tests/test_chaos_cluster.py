"""A node goes with everything on it, and the HTTP proxy dies: on a cluster of several nodes on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deployments.demo.tenants import SAMPLES
from deployments.local import deploy
from tests.chaos.events import ROUNDS, assert_unharmed, record
from tests.chaos.history import History
from tests.chaos.load import Load, alone, by_handle, by_http
from tests.chaos.processes import PROXY, actor_pids, kill, node_pids, stopped, wait_for_successors
from tests.serving import Application, demo_args, free_port, serve_pids, wait_for

pytestmark = pytest.mark.serve

_NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}  # a replica and a half: two replicas take two nodes
_OUTAGE_S = 6.0 if ROUNDS > 1 else 12.0  # of a dead proxy; CI's machine is shared. Ray's default costs 25 s


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that holds only Serve's controller and proxy, and two nodes."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
        )
        try:
            for _ in range(2):
                cluster.add_node(**_NODE)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Application:  # noqa: ARG001  # it is connected
    """The demo's application on the cluster. Not named ``app``: what needs that comes after all other Rays."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
    args = demo_args(tmp_path_factory.mktemp("store"), num_cpus=1.5)
    return Application(deploy(args), port)


@pytest.fixture
def history(nodes: Application) -> History:
    wait_for(lambda: len(serve_pids("replica")) == 2)
    return alone(nodes, SAMPLES)


def test_a_lost_node_loses_nothing(nodes: Application, history: History, cluster: Any) -> None:
    """The one with the only router and one of two replicas; whoever asks tries again once."""
    moments = []
    with Load(by_handle(nodes.handle), history, attempts=2) as load:
        for _ in range(ROUNDS):
            (router,) = serve_pids("router")
            replicas = set(serve_pids("replica"))
            (node,) = [node for node in cluster.worker_nodes if router in node_pids(node)]
            lost = node_pids(node)
            assert len(replicas & set(lost)) == 1
            with stopped(*replicas):
                wait_for(lambda: load.in_flight >= 12)  # the oldest have been with the router for a while
                start = monotonic()
                kill(lost)
            load.wait_for_answers()
            moments.append((start, monotonic()))
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(**_NODE)
            wait_for_successors("replica", replicas & set(lost), 2)
            load.wait_for_answers()
    record("node lost", history, moments)
    assert_unharmed(history)
    assert history.verdict().retried, "nothing was in flight: the test proved nothing"


def test_a_killed_proxy_is_back_soon(nodes: Application, history: History) -> None:
    """Nobody can connect meanwhile; callers who keep trying are all answered."""
    moments = []
    with Load(by_http(str(nodes.http.base_url)), history, rate=8.0, attempts=100) as load:
        for _ in range(ROUNDS):
            before = actor_pids(PROXY)
            start = monotonic()
            kill(before)
            load.wait_for_answers(1)
            moments.append((start, monotonic()))
            load.wait_for_answers()
    record("proxy killed", history, moments)
    assert_unharmed(history)
    assert max(end - start for start, end in moments) < _OUTAGE_S
