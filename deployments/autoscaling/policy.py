"""The policy as Ray Serve's controller calls it, ten times a second. Never blocks and never raises there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from deployments.autoscaling.decision import Decision, State, decide
from deployments.autoscaling.knobs import Knobs
from deployments.autoscaling.reports import Reports
from deployments.autoscaling.serve_config import POLICY

_LABELS = ("application", "deployment")


class AdapterLoad:
    """An application's policy: decides for each of its deployments that was configured by ``for_replicas``.

    Everything it decides, and why, is in the controller's log and in Ray's metrics.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, **knobs: Any) -> None:
        """``knobs`` are given where Serve makes one for a single deployment, see ``for_replicas``; read elsewhere."""
        del knobs
        self._clock = clock
        self._logger = logging.getLogger("ray.serve")  # the controller's
        self._reports = Reports()
        self._bases: dict[Any, tuple[Knobs, State]] = {}
        self._said: set[str] = set()
        self._shown: dict[tuple[str, ...], int] = {}
        self._wanted = Gauge(
            "adapter_router_autoscaling_wanted_replicas", "Replicas that a rule alone asks for", (*_LABELS, "rule")
        )
        self._target = Gauge("adapter_router_autoscaling_target_replicas", "Replicas there shall be", _LABELS)
        self._decisions = Counter(
            "adapter_router_autoscaling_decisions", "Changes of the number of replicas", (*_LABELS, "reason")
        )

    def __call__(self, contexts: Any) -> tuple[Any, dict[Any, Any]]:
        """Of an application's contexts by deployment: replicas by deployment. Of a single context: no change."""
        if not isinstance(contexts, Mapping):
            self._say_once(
                f"{contexts.deployment_name} is not autoscaled: application {contexts.app_name!r} lacks "
                f"autoscaling_policy {{policy_function: {POLICY}}}"
            )
            return contexts.target_num_replicas, {}
        now = self._clock()
        ours = {key: context for key, context in contexts.items() if context.config.policy.policy_function == POLICY}
        routers = [context for key, context in contexts.items() if key not in ours]
        decisions = {}
        for key, context in ours.items():
            try:
                decision = self._decide(key, context, routers, now)
            except Exception as error:
                self._say_once(f"{context.deployment_name} is not autoscaled: {error!r}")
                continue
            decisions[key] = decision.replicas
            self._show(context, decision)
        return decisions, {}

    def _decide(self, key: Any, context: Any, routers: list[Any], now: float) -> Decision:
        knobs = Knobs(**context.config.policy.policy_kwargs)
        if key not in self._bases or self._bases[key][0] != knobs:
            self._bases[key] = knobs, State(knobs)
        signals = self._reports.signals(context, routers, knobs.report_interval_s, now)
        return decide(signals, knobs, self._bases[key][1], now)

    def _show(self, context: Any, decision: Decision) -> None:
        labels = {"application": context.app_name, "deployment": context.deployment_name}
        shown = {(*labels.values(), rule): wanted for rule, wanted in decision.wanted.items()}
        shown[tuple(labels.values())] = decision.replicas
        for key, value in shown.items():
            if self._shown.get(key) != value:
                self._shown[key] = value
                gauge, rule = (self._wanted, {"rule": key[2]}) if len(key) > 2 else (self._target, {})
                gauge.set(value, {**labels, **rule})
        if decision.replicas != context.target_num_replicas:
            self._decisions.inc(1, {**labels, "reason": decision.reason})
            self._logger.info(
                "Replicas of %s: %d -> %d because of %s; each rule wants %s.",
                context.deployment_name,
                context.target_num_replicas,
                decision.replicas,
                decision.reason,
                dict(decision.wanted),
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._logger.error(message)
