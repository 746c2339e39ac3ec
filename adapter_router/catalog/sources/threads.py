"""Calls that block, for event loops that must be able to give them up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


async def in_thread(call: Callable[[], _Result]) -> _Result:
    """What ``call`` returns or raises, in a thread of its own.

    Nobody waits for the thread once this is cancelled. For those of ``asyncio.to_thread`` the loop waits when it ends,
    however long, and so does the process.
    """
    outcome: Future[_Result] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    outcome.set_running_or_notify_cancel()
    threading.Thread(target=run, name="source", daemon=True).start()
    return await asyncio.wrap_future(outcome)
