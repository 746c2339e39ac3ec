"""Processes die, hang and come back under constant load: nothing is lost, doubled or wrong.

``make chaos`` runs the long version, and writes down what each event cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic

import pytest
from ray import serve

from adapter_router.types import Row
from deployments.app import APP_NAME
from deployments.demo.tenants import SAMPLES
from tests.chaos.events import ROUNDS, assert_unharmed, record
from tests.chaos.history import Answer, History, Request
from tests.chaos.load import Load, alone, answer_of, by_handle
from tests.chaos.processes import CONTROLLER, actor_pids, kill, stopped, wait_for_successors
from tests.serving import Application, serve_pids, wait_for

_DEADLINE_S = 10.0
_LONG = "word " * 40
_BATCH = 32
_PATIENCE_S = 600.0


@pytest.fixture
def history(app: Application) -> History:
    wait_for(lambda: len(serve_pids("replica")) == 2)
    return alone(app, SAMPLES)


@pytest.mark.serve
def test_a_killed_replica_loses_nothing(app: Application, history: History) -> None:
    retried = app.metric("retried_rows_total")
    long = {name: [_LONG] for name in SAMPLES}
    batches = [alone(app, long) for _ in range(ROUNDS)]
    moments = []
    with Load(by_handle(app.handle), history) as load:
        for batch in batches:
            before = serve_pids("replica")
            with _long_batches(app, batch):
                start = monotonic()
                kill(before[:1])
            wait_for_successors("replica", before[:1], 2)
            wait_for(lambda: _serving_replicas(app) == 2)
            load.wait_for_answers()
            moments.append((start, monotonic()))
    record("replica killed", history, moments)
    assert_unharmed(history)
    assert not history.verdict().retried, "callers had to do something about it"
    assert app.metric("retried_rows_total") > retried, "the kills hit no call in flight: the test proved nothing"


@pytest.mark.serve
def test_all_replicas_killed_at_once_lose_nothing(app: Application, history: History) -> None:
    """No load call is repeated: whatever is registered, a replica that has just started serves."""
    moments = []
    with Load(by_handle(app.handle), history) as load:
        for _ in range(ROUNDS):
            before = serve_pids("replica")
            start = monotonic()
            kill(before)
            wait_for_successors("replica", before, 2)
            wait_for(lambda: _serving_replicas(app) == 2)
            load.wait_for_answers()
            moments.append((start, monotonic()))
    record("all replicas killed", history, moments)
    assert_unharmed(history)
    assert not history.verdict().retried


@pytest.mark.serve
def test_a_killed_router_costs_callers_one_retry(app: Application, history: History) -> None:
    """After 0.25 to 0.5 s. Whoever never tries again loses what is in flight until Serve knows, and nothing else."""
    moments = []
    in_flight = 0
    late: list[Request] = []
    with Load(by_handle(app.handle), history, attempts=2) as load:
        for _ in range(ROUNDS):
            (before,) = serve_pids("router")
            with stopped(*serve_pids("replica")):
                wait_for(lambda: load.in_flight >= 12)  # the oldest have been with the router for a while
                start = monotonic()
                kill([before])
                in_flight += load.in_flight
            wait_for_successors("router", [before], 1)
            number = len(history.requests)
            load.wait_for_answers()
            late += history.requests[number:]
            moments.append((start, monotonic()))
    record("router killed", history, moments, in_flight=in_flight)
    assert_unharmed(history)
    retried = history.verdict().retried
    assert retried, "the kills hit nothing in flight: the test proved nothing"
    assert not [request for request in retried if request in late], "lost with the new router there"


@pytest.mark.serve
def test_a_killed_controller_is_not_noticed(app: Application, history: History) -> None:
    moments = []
    with Load(by_handle(app.handle), history) as load:
        for _ in range(ROUNDS):
            before = actor_pids(CONTROLLER)
            replicas = serve_pids("replica")
            start = monotonic()
            kill(before)
            wait_for(lambda before=before: set(actor_pids(CONTROLLER)) - set(before) != set())  # type: ignore[misc]
            wait_for(lambda: serve.status().applications[APP_NAME].status == "RUNNING")
            load.wait_for_answers()
            moments.append((start, monotonic()))
            assert serve_pids("replica") == replicas
    record("controller killed", history, moments)
    assert_unharmed(history)
    assert not history.verdict().retried


@pytest.mark.serve
def test_a_replica_that_hangs_makes_no_request_slower_than_its_deadline(app: Application, history: History) -> None:
    """It is stopped, not killed: no connection breaks, and its health checks do not fail for long."""
    moments = []
    with Load(by_handle(app.handle, _DEADLINE_S), history) as load:
        for _ in range(ROUNDS):
            start = monotonic()
            with stopped(serve_pids("replica")[0]):
                hanging = load.wait_for_the_hanging()
                wait_for(lambda hanging=hanging: all(request.replies for request in hanging))  # type: ignore[misc]
                load.wait_for_answers(100)
            moments.append((start, monotonic()))
            load.wait_for_answers()
    record("replica hangs", history, moments)
    assert_unharmed(history)
    assert max(request.seconds for request in history.requests) < _DEADLINE_S
    assert not history.verdict().retried


def _lose(request: Request) -> None:
    request.replies = [(1.0, TimeoutError())]


def _double(request: Request) -> None:
    request.replies *= 2


def _give_anothers(request: Request) -> None:
    request.replies = [(1.0, Answer("b", "v1", (0.4, 0.6)))]


def _give_an_older(request: Request) -> None:
    request.replies = [(1.0, replace(_ANSWERS["a", "x"], version="v0"))]


_ANSWERS = {("a", "x"): Answer("a", "v1", (0.1, 0.9)), ("b", "x"): Answer("b", "v1", (0.4, 0.6))}


@pytest.mark.parametrize(
    ("harm", "seen"), [(_lose, "lost"), (_double, "duplicated"), (_give_anothers, "wrong"), (_give_an_older, "wrong")]
)
def test_the_history_sees_what_was_lost_doubled_or_wrong(harm: Callable[[Request], None], seen: str) -> None:
    history = History(_ANSWERS)
    history.requests += [Request(*key, 0.0, 1, [(1.0, answer)]) for key, answer in _ANSWERS.items()]
    assert_unharmed(history)
    harm(history.requests[0])
    verdict = history.verdict()
    assert {name: len(getattr(verdict, name)) for name in ("lost", "duplicated", "wrong")} == {
        name: int(name == seen) for name in ("lost", "duplicated", "wrong")
    }


def test_a_history_refuses_answers_that_nobody_could_tell_apart() -> None:
    with pytest.raises(ValueError, match="same answer"):
        History({("a", "x"): _ANSWERS["a", "x"], ("a", "y"): _ANSWERS["a", "x"]})


@contextmanager
def _long_batches(app: Application, history: History) -> Iterator[None]:
    """Both replicas compute for seconds from the start of the block on; afterwards the answers are waited for."""
    history.requests = [Request(*key, monotonic(), 1) for key in history.asked for _ in range(_BATCH)]
    rows = [Row(request.text, request.adapter, timeout_s=_PATIENCE_S) for request in history.requests]
    before = app.metric("batch_rows_sum")
    answer = app.handle.infer_many.remote(rows)
    # A replica has two batches at once: with three under way nobody is idle.
    wait_for(lambda: app.metric("batch_rows_sum") - before >= 3 * _BATCH)
    yield
    for request, outcome in zip(history.requests, answer.result(timeout_s=_PATIENCE_S), strict=True):
        request.replies.append((monotonic(), answer_of(outcome)))
    assert_unharmed(history)


def _serving_replicas(app: Application) -> int:
    lines = app.http.get("/metrics").text.splitlines()
    return len({line.split('process="replica:')[1].split('"')[0] for line in lines if 'process="replica:' in line})
