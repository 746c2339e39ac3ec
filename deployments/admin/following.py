"""Registrations on their way to Ready or Failed, watched with a progress bar."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deployments.admin.client import Refused, Server, adapter_path
from deployments.admin.tables import Screen

_LOOK_S = 0.2
_STEPS = {"Registered": 0, "Fetching": 1, "Validating": 2, "Ready": 3, "Failed": 3, "Retired": 3}
_DONE = 3


def revision(server: Server) -> int:
    """Where the event log ends."""
    now: int = server.ask("GET", "/v1/events", query={"limit": 1})["revision"]
    return now


def follow(
    server: Server, registered: Mapping[str, dict[str, Any]], since: int, screen: Screen
) -> dict[str, dict[str, Any] | Refused]:
    """Wait until nothing more happens by itself to what was ``registered`` (by name); what became of each.

    Costs requests for what changes after revision ``since``, however many adapters there are.
    """
    seen: dict[str, dict[str, Any] | Refused] = dict(registered)
    with _bar(screen) as bar:
        task = bar.add_task("", total=_DONE * len(seen))
        while True:
            phases = Counter(map(_phase, seen.values()))
            bar.update(task, description=_described(phases), completed=sum(_STEPS[p] * n for p, n in phases.items()))
            pending = {name for name, registration in seen.items() if _STEPS[_phase(registration)] < _DONE}
            if not pending:
                return seen
            touched, since = _touched(server, since)
            seen.update({name: _registration(server, name) for name in touched & pending})
            if not touched & pending:
                time.sleep(_LOOK_S)


def _touched(server: Server, since: int) -> tuple[set[str], int]:
    """Names that something happened to after revision ``since``, and the revision up to which they are known."""
    names = set()
    for event in server.pages("/v1/events", after=since):
        names.add(event["name"])
        since = event["revision"]
    return names, since


def _registration(server: Server, name: str) -> dict[str, Any] | Refused:
    """An adapter as the server knows it, or that it is gone."""
    try:
        registration: dict[str, Any] = server.ask("GET", adapter_path(name))
    except Refused as error:
        return error
    return registration


def _phase(registration: Mapping[str, Any] | Refused) -> str:
    return "Retired" if isinstance(registration, Refused) else str(registration["phase"])


def _described(phases: Counter[str]) -> str:
    return (
        ", ".join(f"{count} {phase}" for phase, count in phases.items()) if phases.total() > 1 else next(iter(phases))
    )


def _bar(screen: Screen) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=screen.talk,
        transient=True,
        disable=screen.is_quiet,
    )
