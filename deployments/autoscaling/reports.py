"""The numbers that routers and replicas report, and what they say of one base together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deployments.autoscaling.decision import Signals

_STALE_S = 10.0  # a router that has not reported for so long, and for several intervals, is not heard
_STALE_INTERVALS = 5.0


def router_report(loads: Mapping[str, Any]) -> dict[str, float]:
    """What a router's ``record_autoscaling_stats`` returns: a ``RouterLoad`` of each base, by its deployment's name."""
    return {
        f"{deployment}/{name}": float(value)
        for deployment, load in loads.items()
        for name, value in asdict(load).items()
    }


def replica_report(load: Any) -> dict[str, float]:
    """What a replica's ``record_autoscaling_stats`` returns, from its ``ReplicaLoad``."""
    return {name: float(value) for name, value in asdict(load).items()}


class Reports:
    """Remembers when each router was last heard, by the controller's clock: theirs may be wrong."""

    def __init__(self) -> None:
        self._heard: dict[Any, tuple[float, float]] = {}

    def signals(self, replicas: Any, routers: list[Any], interval_s: float, now: float) -> Signals:
        """Of the base whose replicas' ``AutoscalingContext`` is the first, reported by ``routers``, contexts as well.

        Queues add up. Of the working set the largest counts: every router sees a part of the same stream.
        """
        named = {name: self._last(routers, f"{replicas.deployment_name}/{name}") for name in _OF_ROUTERS}
        own = {name: list(self._last([replicas], name).values()) for name in _OF_REPLICAS}
        running = [replica for context in routers for replica in context.running_replicas]
        heard = self._listen(routers, f"{replicas.deployment_name}/idle_s", now)
        patience = max(_STALE_S, _STALE_INTERVALS * interval_s)
        fresh = [replica for replica in running if replica in heard and now - heard[replica] <= patience]
        return Signals(
            target=replicas.target_num_replicas,
            running=replicas.current_num_replicas,
            complete=bool(running) and len(fresh) == len(running),
            working_set_bytes=max(named["working_set_bytes"].values(), default=0.0),
            waiting_tokens=sum(named["open_tokens"].values()),
            tokens_s=sum(named["tokens_s"].values()),
            queued_rows=sum(named["queued_rows"].values()),
            queue_age_s=max(named["waited_s"].values(), default=0.0),
            misses_s=sum(named["missed_s"].values()),
            idle_s=min(named["idle_s"].values(), default=math.inf),
            capacity_bytes=_mean(value for value in own["capacity_bytes"] if value > 0),
            loading_fraction=_mean(own["loading_fraction"]),
            evictions_s=_mean(own["evictions_s"]),
        )

    def _listen(self, contexts: list[Any], name: str, now: float) -> dict[Any, float]:
        """When each replica's latest report came."""
        reported = {
            replica: series[-1].timestamp
            for context in contexts
            for replica, series in (context.raw_metrics or {}).get(name, {}).items()
            if series
        }
        before, self._heard = self._heard, {}
        for replica, timestamp in reported.items():
            known = before.get(replica)
            self._heard[replica] = known if known and known[0] == timestamp else (timestamp, now)
        return {replica: heard for replica, (_, heard) in self._heard.items()}

    def _last(self, contexts: list[Any], name: str) -> dict[Any, float]:
        return {
            replica: series[-1].value
            for context in contexts
            for replica, series in (context.raw_metrics or {}).get(name, {}).items()
            if series
        }


_OF_ROUTERS = (
    "queued_rows",
    "open_tokens",
    "waited_s",
    "idle_s",
    "tokens_s",
    "missed_s",
    "working_set_bytes",
)
_OF_REPLICAS = ("capacity_bytes", "loading_fraction", "evictions_s")


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
