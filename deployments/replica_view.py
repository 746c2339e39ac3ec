"""The living replicas of each deployment, as Ray Serve last told this process.

A module of its own because Serve pickles the request router's module by value: state kept there would be a copy.
"""

from __future__ import annotations

from adapter_router.routing.replica_state import Member

_members: dict[tuple[str, str], tuple[Member, ...]] = {}


def publish(app: str, deployment: str, members: tuple[Member, ...]) -> None:
    """Replace the snapshot of one deployment; called from Serve's own event loop."""
    _members[app, deployment] = members


def members(app: str, deployment: str) -> tuple[Member, ...]:
    """The living replicas; empty before Serve's first word."""
    return _members.get((app, deployment), ())
