"""Threads that work in lanes: what hangs in one lane holds up nobody in another, until all threads there may be hang.

Threads are daemons that come with work and go when there has been none for a while: one that hangs for ever keeps no
process from ending.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapter_router.errors import AdapterUnavailable

logger = logging.getLogger(__name__)

_IDLE_S = 10.0  # a thread's memory is warm: the next load finds it there

_Result = TypeVar("_Result")


@dataclass
class _Lane:
    running: int = 0
    waiting: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)


class Lanes:
    """Work by lane, each lane's in the order it came. Thread-safe."""

    def __init__(self, name: str, width: int, most: int) -> None:
        """At most ``width`` threads in one lane and ``most`` altogether."""
        self._name = name
        self._width = width
        self._most = most
        self._lanes: dict[str, _Lane] = {}
        self._threads: set[threading.Thread] = set()
        self._started = 0
        self._working = 0
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, lane: str, work: Callable[[], _Result]) -> Future[_Result]:
        """Run ``work`` in ``lane``. Raises AdapterUnavailable after ``close``, and where no thread is to be had."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._closed:
                raise AdapterUnavailable("the engine is closing")
            self._lanes.setdefault(lane, _Lane()).waiting.append((future, work))
            self._changed.notify()
            if len(self._threads) - self._working < self._ready() and len(self._threads) < self._most:
                self._start_thread(lane)
        return future

    def close(self, timeout_s: float) -> None:
        """Cancel what waits, and wait for what runs, but no longer than ``timeout_s`` altogether."""
        with self._changed:
            self._closed = True
            waiting = [future for lane in self._lanes.values() for future, _ in lane.waiting]
            for lane in self._lanes.values():
                lane.waiting.clear()
            threads = list(self._threads)
            self._changed.notify_all()
        for future in waiting:
            future.cancel()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start_thread(self, lane: str) -> None:
        """For what has just come to ``lane``."""
        self._started += 1
        thread = threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has none to give: those there are do the work, if there are any
            if self._threads:
                return
            del self._lanes[lane]  # without threads nothing else waits
            raise AdapterUnavailable("the system has no thread to load adapters with; try again later") from error
        self._threads.add(thread)

    def _ready(self) -> int:
        """How much work may begin now; threads that have been started or woken take theirs in a moment."""
        return sum(min(len(lane.waiting), self._width - lane.running) for lane in self._lanes.values())

    def _open_lane(self) -> str | None:
        """The lane with work and the fewest threads, if it may have another."""
        open_lanes = [name for name, lane in self._lanes.items() if lane.waiting and lane.running < self._width]
        return min(open_lanes, key=lambda name: self._lanes[name].running, default=None)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            lane, future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del future, work  # nothing is kept alive while this thread waits for other work
            self._leave(lane)

    def _next(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        with self._changed:
            while (name := self._open_lane()) is None:
                notified = not self._closed and self._changed.wait(_IDLE_S)
                if not notified and self._open_lane() is None:
                    self._threads.discard(threading.current_thread())
                    return None
            lane = self._lanes[name]
            lane.running += 1
            self._working += 1
            return (name, *lane.waiting.popleft())

    def _leave(self, name: str) -> None:
        with self._changed:
            lane = self._lanes[name]
            lane.running -= 1
            self._working -= 1
            if not lane.running and not lane.waiting:
                del self._lanes[name]
