"""How many replicas each base gets, by adapter load: Ray Serve's application-level policy ``AdapterLoad``.

Serve pickles the policy's module by value, and with a package all its modules: the controller needs none of our code.
So nothing here imports anything of ours, torch, or what a controller may lack.
"""

from deployments.autoscaling.knobs import Knobs
from deployments.autoscaling.policy import AdapterLoad
from deployments.autoscaling.reports import replica_report, router_report
from deployments.autoscaling.serve_config import POLICY, for_replicas, for_routers

__all__ = ["POLICY", "AdapterLoad", "Knobs", "for_replicas", "for_routers", "replica_report", "router_report"]
