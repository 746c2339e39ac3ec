"""Replicas die under load: nothing is lost, nothing is wrong, and the fleet is whole again."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from adapter_router.types import Row, RowResult
from deployments.demo.tenants import SAMPLES
from tests.serving import Application, serve_pids, wait_for

pytestmark = pytest.mark.serve

ROWS = [Row(text, name) for name, texts in SAMPLES.items() for text in texts]


def test_sigkilled_replicas_lose_nothing(app: Application) -> None:
    answers = app.infer_many(ROWS)
    expected = {(row.adapter, row.inputs): a.logits for row, a in zip(ROWS, answers, strict=True)}  # type: ignore[union-attr]
    stop = threading.Event()
    failures: list[str] = []
    answered = [0] * 16

    def call(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            row = rng.choice(ROWS)
            try:
                outcome = app.handle.infer.remote(row).result(timeout_s=60)
            except Exception as error:
                failures.append(repr(error))
                continue
            if not isinstance(outcome, RowResult):
                failures.append(repr(outcome))
            elif np.abs(outcome.logits - expected[row.adapter, row.inputs]).max() > 1e-4:
                failures.append(f"wrong answer for {row}")
            answered[number] += 1

    wait_for(lambda: len(serve_pids("replica")) == 2)
    retries = app.metric("retried_rows_total")
    callers = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(16)]
    for caller in callers:
        caller.start()
    for _ in range(2):
        before = set(serve_pids("replica"))
        wait_for(lambda: min(answered) > 0)
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda before=before: len(set(serve_pids("replica")) - before) == 1)  # type: ignore[misc]
        wait_for(lambda: _serving_replicas(app) == 2)
        progress = list(answered)
        wait_for(lambda progress=progress: all(a > b for a, b in zip(answered, progress, strict=True)))  # type: ignore[misc]
    stop.set()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert failures == []
    assert sum(answered) > 100
    assert app.metric("retried_rows_total") > retries, "the kills hit no call in flight: the test proved nothing"


def test_a_new_replica_serves_adapters_loaded_before_its_time(app: Application) -> None:
    """No load call is repeated: whatever is registered, any replica serves."""
    for pid in serve_pids("replica"):
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    outcomes = app.infer_many(ROWS)
    assert all(isinstance(outcome, RowResult) for outcome in outcomes), outcomes
    assert time.monotonic() - start < 60
    wait_for(lambda: _serving_replicas(app) == 2)


def _serving_replicas(app: Application) -> int:
    lines = app.http.get("/metrics").text.splitlines()
    return len({line.split('process="replica:')[1].split('"')[0] for line in lines if 'process="replica:' in line})
