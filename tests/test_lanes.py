"""Lanes: one that hangs or is full holds up no other, and nothing is lost or left running."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from adapter_router.engine.lanes import Lanes
from adapter_router.errors import AdapterUnavailable

WAIT_S = 20.0


def test_a_lane_that_hangs_holds_up_no_other() -> None:
    lanes, hung = Lanes("test", width=2, most=4), threading.Event()
    stuck = [lanes.submit("slow", lambda: hung.wait(WAIT_S)) for _ in range(10)]
    done = [lanes.submit("quick", lambda n=n: n) for n in range(50)]  # type: ignore[misc]
    assert [future.result(WAIT_S) for future in done] == list(range(50))
    assert not any(future.done() for future in stuck)
    hung.set()
    assert all(future.result(WAIT_S) for future in stuck)


@pytest.mark.parametrize(("most", "running"), [(50, {"a": 3, "b": 3, "c": 1}), (5, None)])
def test_no_more_threads_than_allowed_and_none_without_work(
    monkeypatch: pytest.MonkeyPatch, most: int, running: dict[str, int] | None
) -> None:
    monkeypatch.setattr("adapter_router.engine.lanes._IDLE_S", 0.01)
    lanes, go_on, started = Lanes("test", width=3, most=most), threading.Event(), list[str]()

    def work(lane: str) -> None:
        started.append(lane)
        go_on.wait(WAIT_S)

    futures = [lanes.submit(lane, lambda lane=lane: work(lane)) for lane in "aaaabbbbc"]  # type: ignore[misc]
    _wait_until(lambda: len(started) >= (5 if running is None else 7))
    assert len(lanes._threads) == (5 if running is None else 7)
    assert running is None or Counter(started) == running
    go_on.set()
    for future in futures:
        future.result(WAIT_S)
    assert sorted(started) == sorted("aaaabbbbc")
    _wait_until(lambda: not lanes._threads and not lanes._lanes)


def test_threads_are_used_again_and_work_never_waits_for_one() -> None:
    lanes = Lanes("test", width=2, most=50)
    for _ in range(200):
        lanes.submit("quick", lambda: None).result(WAIT_S)
    assert len(lanes._threads) <= 2
    both = threading.Barrier(2)
    for _ in range(200):  # two at once, though one thread that was woken has not begun yet
        futures = [lanes.submit(lane, lambda: both.wait(WAIT_S)) for lane in ("one", "other")]
        assert sorted(future.result(WAIT_S) for future in futures) == [0, 1]


def test_work_of_a_lane_is_done_in_its_order() -> None:
    lanes, order = Lanes("test", width=1, most=3), list[int]()
    futures = [lanes.submit("one", lambda n=n: order.append(n)) for n in range(100)]  # type: ignore[misc]
    for future in futures:
        future.result(WAIT_S)
    assert order == list(range(100))


def test_what_fails_fails_alone() -> None:
    lanes = Lanes("test", width=1, most=1)
    bad = lanes.submit("one", lambda: 1 / 0)
    good = lanes.submit("one", lambda: 1)
    assert good.result(WAIT_S) == 1
    with pytest.raises(ZeroDivisionError):
        bad.result(WAIT_S)


def test_closing_cancels_what_waits_and_does_not_wait_for_what_hangs() -> None:
    lanes, started, hung = Lanes("test", width=1, most=1), threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        hung.wait(WAIT_S)

    stuck, waiting = lanes.submit("one", hang), lanes.submit("one", lambda: None)
    assert started.wait(WAIT_S)
    lanes.close(0.01)
    assert waiting.cancelled() and not stuck.done()
    with pytest.raises(AdapterUnavailable, match="closing"):
        lanes.submit("one", lambda: None)
    hung.set()
    stuck.result(WAIT_S)


def test_closing_waits_for_what_ends() -> None:
    lanes, started, go_on = Lanes("test", width=1, most=1), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go_on.wait(WAIT_S)

    future = lanes.submit("one", work)
    assert started.wait(WAIT_S)
    threading.Timer(0.05, go_on.set).start()
    lanes.close(WAIT_S)
    assert future.done() and not lanes._threads


def test_where_no_thread_is_to_be_had_work_is_refused_or_done_by_those_there_are() -> None:
    lanes, go_on = Lanes("test", width=1, most=4), threading.Event()

    def without_threads(lane: str, work: Callable[[], int]) -> Future[int]:
        usual = threading.stack_size(1 << 46)  # more than there is memory
        try:
            return lanes.submit(lane, work)
        finally:
            threading.stack_size(usual)

    with pytest.raises(AdapterUnavailable, match="no thread"):
        without_threads("one", lambda: 1)
    assert not lanes._lanes
    busy = lanes.submit("one", lambda: go_on.wait(WAIT_S))
    waiting = without_threads("other", lambda: 2)
    go_on.set()
    assert busy.result(WAIT_S) and waiting.result(WAIT_S) == 2
    lanes.close(WAIT_S)
    assert not lanes._threads


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
