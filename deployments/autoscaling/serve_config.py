"""What Ray Serve is told of deployments whose number of replicas our policy decides, or whose numbers it needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deployments.autoscaling.knobs import Knobs

POLICY = "deployments.autoscaling:AdapterLoad"
"""For ``autoscaling_policy`` of an application in a Serve config: ``{policy_function: …}``."""

_KEPT = 10  # reports that Serve keeps of each replica; only the last one is read


def for_replicas(knobs: Knobs) -> dict[str, Any]:
    """``autoscaling_config`` of one base's replicas.

    Serve's own delays are 0: the policy waits by itself, for it looks at all of the time and not at its end. The knobs
    travel to the controller as the arguments of a policy for this deployment alone, which acts only where nobody gave
    the application its policy: it changes nothing then, and says so.
    """
    return {
        "min_replicas": knobs.min_replicas,
        "max_replicas": knobs.max_replicas,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "downscale_to_zero_delay_s": 0.0,
        "policy": {"policy_function": POLICY, "policy_kwargs": asdict(knobs)},
        **_reporting(knobs.report_interval_s),
    }


def for_routers(count: int, report_interval_s: float) -> dict[str, Any]:
    """``autoscaling_config`` of so many routers, always: Serve collects numbers only of deployments that have one."""
    return {"min_replicas": count, "max_replicas": count, **_reporting(report_interval_s)}


def _reporting(interval_s: float) -> dict[str, float]:
    # Deprecated in 2.60, but the environment variables that shall replace it are read nowhere.
    return {"metrics_interval_s": interval_s, "look_back_period_s": _KEPT * interval_s}
