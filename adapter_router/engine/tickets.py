"""Wishes for adapters, and the loads they wait for."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from adapter_router.engine.resident import ResidentAdapter
from adapter_router.errors import AdapterRouterError
from adapter_router.types import AdapterVersion


class Ticket(Future[ResidentAdapter]):
    """One thread's wish for ``version``: done once it is on the device and leased for that thread, or has failed."""

    def __init__(self, version: AdapterVersion) -> None:
        super().__init__()
        self.version = version

    def outcome(self) -> ResidentAdapter | AdapterRouterError:
        """What came of it, once it is done."""
        error = self.exception()
        if error is None:
            return self.result()
        assert isinstance(error, AdapterRouterError)
        return error


@dataclass(eq=False)
class Load:
    """A content on its way, as ``version`` says where it lies and what it is, and who waits for it.

    ``waiting``: the adapter, where all it needs is room.
    """

    version: AdapterVersion
    waiting: ResidentAdapter | None = None
    tickets: list[Ticket] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def fail(self, error: AdapterRouterError) -> None:
        """Tell everybody who waits."""
        for ticket in self.tickets:
            ticket.set_exception(error)
        self.tickets.clear()

    def take_others(self) -> list[Ticket]:
        """Those who know the content otherwise, by another name or from another source, wait here no longer."""
        others = [ticket for ticket in self.tickets if ticket.version != self.version]
        self.tickets = [ticket for ticket in self.tickets if ticket.version == self.version]
        return others
