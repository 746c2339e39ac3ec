"""What each event cost: asserted of every history, and written down when the long version runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Result, write_json
from tests.chaos.history import History

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
"""How often each process is killed: once in CI, more often in ``make chaos``."""


def assert_unharmed(history: History) -> None:
    """Every request has exactly one answer, and the right one."""
    verdict = history.verdict()
    assert not verdict.lost, f"{len(verdict.lost)} of {len(history.requests)} lost, such as {verdict.lost[0]}"
    assert not verdict.duplicated and not verdict.wrong, verdict


def record(event: str, history: History, moments: Sequence[tuple[float, float]], **more: float) -> None:
    """Write an event's figures to the JSON file that ``CHAOS_JSON`` names, beside those of others; nothing without it.

    ``moments``: from when to when it was on, each time. Latencies are of requests that were under way in there.
    """
    path = Path(os.environ.get("CHAOS_JSON", os.devnull))
    if path == Path(os.devnull):
        return
    verdict = history.verdict()
    during = sorted(
        request.seconds
        for request in history.requests
        if any(request.started < end and request.started + request.seconds > start for start, end in moments)
    )
    figures = [
        Result(f"{event}/times", len(moments), "", 0.0),
        Result(f"{event}/requests", len(history.requests), "", 0.0),
        Result(f"{event}/requests_during", len(during), "", 0.0),
        Result(f"{event}/lost", len(verdict.lost), "", 0.0),
        Result(f"{event}/duplicated", len(verdict.duplicated), "", 0.0),
        Result(f"{event}/wrong", len(verdict.wrong), "", 0.0),
        Result(f"{event}/retried_by_caller", len(verdict.retried), "", 0.0),
        Result(f"{event}/refused_at_first", sum(request.refusals > 0 for request in history.requests), "", 0.0),
        Result(f"{event}/p50", during[len(during) // 2], "s", 0.0),
        Result(f"{event}/p99", during[int(len(during) * 0.99)], "s", 0.0),
        Result(f"{event}/slowest", during[-1], "s", 0.0),
        Result(f"{event}/longest", max(end - start for start, end in moments), "s", 0.0),
        *(Result(f"{event}/{name}", value, "", 0.0) for name, value in more.items()),
    ]
    known = json.loads(path.read_text())["results"] if path.exists() else []
    others = [Result(**result) for result in known if not result["name"].startswith(f"{event}/")]
    write_json(path, "chaos", [*others, *figures])
