"""What an operator decides of one base's autoscaling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Knobs:
    """Limits of one base's replicas, and what counts as too few of them. docs/autoscaling.md says when to change what.

    ``memory_fill``: how much of a replica's memory for adapters the working set may take; the rest is for second copies
    of hot adapters and for cold ones. ``target_tokens_per_replica``: tokens of rows that wait or are being computed.
    ``max_loading_fraction``, ``max_evictions_s`` (of one replica, on the mean), ``max_misses_s`` (rows a second that
    were refused or answered too late) and ``max_wait_s`` (of the oldest row in the queue): above any of them, while
    rows are queued, one replica more is needed.
    ``upscale_delay_s``: more replicas must have been needed throughout. ``downscale_delay_s``: fewer must have been
    enough throughout, with ``downscale_margin`` of what they can do. ``downscale_to_zero_delay_s``: nothing was asked.
    ``settle_s``: how long a change is given to show before one replica more is added.
    ``report_interval_s``: how often routers and replicas say how they are.
    """

    max_replicas: int
    min_replicas: int = 1
    memory_fill: float = 0.8
    target_tokens_per_replica: int = 8192
    max_loading_fraction: float = 0.5
    max_evictions_s: float = 1.0
    max_misses_s: float = 0.1
    max_wait_s: float = 1.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    downscale_to_zero_delay_s: float = 600.0
    downscale_margin: float = 0.65
    settle_s: float = 15.0
    report_interval_s: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, must be at least {low}"
            for name, low in (
                ("min_replicas", 0),
                ("max_replicas", 1),
                ("max_loading_fraction", 0),
                ("max_evictions_s", 0),
                ("max_misses_s", 0),
                ("max_wait_s", 0),
                ("upscale_delay_s", 0),
                ("downscale_delay_s", 0),
                ("downscale_to_zero_delay_s", 0),
                ("settle_s", 0),
            )
            if not getattr(self, name) >= low
        ]
        problems += [
            f"{name} is {getattr(self, name)}, must be more than 0"
            for name in ("memory_fill", "target_tokens_per_replica", "downscale_margin", "report_interval_s")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"{name} is {getattr(self, name)}, must be at most 1"
            for name in ("memory_fill", "downscale_margin")
            if not getattr(self, name) <= 1
        ]
        if self.min_replicas > self.max_replicas:
            problems.append(f"min_replicas is {self.min_replicas}, max_replicas only {self.max_replicas}")
        if problems:
            raise ValueError("autoscaling: " + "; ".join(problems))
