"""The living replicas of each deployment, as Ray Serve last told this process.

A module of its own because Serve pickles the request router's module by value: state kept there would be a copy.
"""

from __future__ import annotations

_replicas: dict[tuple[str, str], tuple[str, ...]] = {}


def publish(app: str, deployment: str, replicas: tuple[str, ...]) -> None:
    """Replace the snapshot of one deployment; called from Serve's own event loop."""
    _replicas[app, deployment] = replicas


def replicas(app: str, deployment: str) -> tuple[str, ...]:
    """Unique ids of the living replicas; empty before Serve's first word."""
    return _replicas.get((app, deployment), ())
