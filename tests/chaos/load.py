"""Requests at a constant rate, whatever becomes of those before: who waits for an answer slows nobody down."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
from ray.serve.handle import DeploymentHandle

from adapter_router.errors import AdapterRouterError, Overloaded
from adapter_router.types import Row, RowOutcome
from tests.chaos.history import Answer, History, Request
from tests.serving import Application, wait_for

Ask = Callable[[str, str], Awaitable[Answer]]
"""One attempt: an adapter's answer to a text. Raises whatever went wrong."""

_BACKOFF_S = (0.25, 0.5)  # before the second attempt: until a caller's handle knows that a router is gone
_GIVEN_UP_S = 90.0  # then a request is lost
_GROUP = 4  # requests that start together


class Load:
    """A context in which ``rate`` requests a second are made. On leaving, what is under way is waited for.

    ``attempts``: how often a request is tried before it counts as failed; one that is refused waits as it is told.
    """

    def __init__(self, ask: Ask, history: History, rate: float = 24.0, attempts: int = 1) -> None:
        self.history = history
        self._ask = ask
        self._rate = rate
        self._attempts = attempts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for_answers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(2 * _GIVEN_UP_S)
        assert not self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return sum(not request.replies for request in self.history.requests)

    def wait_for_answers(self, count: int = 20) -> None:
        """Until so many requests that start from now on have been answered."""
        first = len(self.history.requests)
        wait_for(lambda: sum(request.answered for request in self.history.requests[first:]) >= count)

    def wait_for_the_hanging(self, count: int = 2) -> list[Request]:
        """Until so many of the requests that start from now on are under way while younger ones have been answered.

        Returns them.
        """
        first = len(self.history.requests)

        def hanging() -> list[Request]:
            young = self.history.requests[first:]
            last = max((number for number, request in enumerate(young) if request.replies), default=0)
            return [request for request in young[:last] if not request.replies]

        wait_for(lambda: len(hanging()) >= count)
        return hanging()

    async def _run(self) -> None:
        rng = random.Random(0)
        start = time.monotonic()
        ticks = 0
        async with asyncio.TaskGroup() as requests:
            while not self._stop.is_set():
                for adapter, text in rng.sample(self.history.asked, _GROUP):
                    requests.create_task(self._request(adapter, text))
                ticks += 1
                await asyncio.sleep(max(0.0, start + ticks * _GROUP / self._rate - time.monotonic()))

    async def _request(self, adapter: str, text: str) -> None:
        request = Request(adapter, text, time.monotonic())
        self.history.requests.append(request)
        try:
            async with asyncio.timeout(_GIVEN_UP_S):
                reply = await self._answer(request)
        except Exception as error:
            request.replies.append((time.monotonic(), error))
        else:
            request.replies.append((time.monotonic(), reply))

    async def _answer(self, request: Request) -> Answer:
        while True:
            request.attempts += 1
            try:
                return await self._ask(request.adapter, request.text)
            except Overloaded as error:  # it was never taken
                request.attempts -= 1
                request.refusals += 1
                await asyncio.sleep(error.retry_after_s)
            except Exception:
                if request.attempts == self._attempts:
                    raise
                await asyncio.sleep(random.uniform(*_BACKOFF_S))


def answer_of(outcome: RowOutcome) -> Answer:
    """As a history keeps it. Raises the error that stands in its place."""
    if isinstance(outcome, AdapterRouterError):
        raise outcome
    return Answer(outcome.adapter, outcome.version, tuple(outcome.logits.tolist()))


def alone(app: Application, texts: Mapping[str, Sequence[str]]) -> History:
    """Empty, with the answers of rows that were asked one at a time; ``texts`` by adapter."""
    asked = [(adapter, text) for adapter in texts for text in texts[adapter]]
    return History({(adapter, text): answer_of(app.infer_many([Row(text, adapter)])[0]) for adapter, text in asked})


def by_handle(handle: DeploymentHandle, timeout_s: float | None = None) -> Ask:
    """Callers in Python."""

    async def ask(adapter: str, text: str) -> Answer:
        return answer_of(await handle.infer.remote(Row(text, adapter, timeout_s=timeout_s)))

    return ask


def by_http(url: str) -> Ask:
    """Callers over HTTP, each request on a connection of its own."""
    alone = httpx.Limits(max_keepalive_connections=0)
    http = httpx.AsyncClient(base_url=url, timeout=10, limits=alone)

    async def ask(adapter: str, text: str) -> Answer:
        request = {"model": adapter, "input": text, "use_activation": False}
        response = await http.post("/v1/classify", json=request)
        body: Any = response.raise_for_status().json()
        return Answer(body["adapter"]["name"], body["adapter"]["version"], tuple(body["data"][0]["probs"]))

    return ask
